"""Groups of training images, and the draw of the held-out groups."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.dataset import open_training
from data_pipelines.errors import BadInput
from data_pipelines.holdout import groups, held_out, resolve
from data_pipelines.spec import DatasetSpec
from layouts import category


def test_none_and_auto_take_each_image_by_itself():
    names = ["good/b.png", "good/a.png", "good/007.png"]
    expected = [["good/007.png"], ["good/a.png"], ["good/b.png"]]
    assert groups(names, "none") == groups(names, "auto") == expected


def test_a_jump_of_the_number_begins_a_group():
    names = [f"good/num{n:06d}_exp{i % 6}.jpg" for i, n in enumerate([100, 250, 400, 551, 90])]
    expected = [
        ["good/num000090_exp4.jpg", *names[:3]],  # jumps of 10, 150 and 150
        [names[3]],  # 151
    ]
    assert groups(names, "auto") == groups(names, "number:150") == expected


def test_numbers_are_compared_as_numbers():
    assert groups(["a/9.png", "b/10.png", "a/100.png"], "number:5") == [
        ["a/9.png", "b/10.png"],
        ["a/100.png"],
    ]


def test_blocks():
    names = [f"{i}" for i in range(5)]
    assert groups(names, "blocks:2") == [["0", "1", "2"], ["3", "4"]]
    assert groups(names, "blocks:9") == [[n] for n in names]


@pytest.mark.parametrize("rule", ["", "scene", "number", "number:x", "blocks:0", "blocks:-1"])
def test_unknown_rule(rule):
    with pytest.raises(BadInput, match=r"^data\.holdout_groups: "):
        groups(["1", "2"], rule)


def test_name_without_number():
    with pytest.raises(
        BadInput, match=r"^data\.holdout_groups: no number in the file name good/x\.png$"
    ):
        groups(["good/1.png", "good/x.png"], "number:1")


@given(n=st.integers(2, 60), blocks=st.integers(2, 60), seed=st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=50)
def test_whole_groups_just_enough_and_never_all(n, blocks, seed):
    names = [f"{i:02d}" for i in range(n)]
    rule, fraction = f"blocks:{blocks}", 0.25
    drawn = held_out(names, rule, fraction=fraction, seed=seed)
    drawn_groups = [set(g) for g in groups(names, rule) if set(g) & drawn]
    assert set().union(*drawn_groups) == drawn
    assert 0 < len(drawn) < n
    assert drawn == held_out(names[::-1], rule, fraction=fraction, seed=seed)
    enough = len(drawn) >= fraction * n
    assert enough or len(drawn_groups) == len(groups(names, rule)) - 1
    # Without one of the groups, it would have been too little.
    assert any(len(drawn - group) < fraction * n for group in drawn_groups)


def test_five_percent_of_single_images():
    names = [f"{i:03d}" for i in range(100)]
    draws = [frozenset(held_out(names, "none", fraction=0.05, seed=s)) for s in range(20)]
    assert {len(d) for d in draws} == {5}
    assert len(set(draws)) == 20
    assert len(held_out(names, "none", fraction=0.07, seed=0)) == 7  # 0.07 * 100 > 7 in floats


def test_one_group_is_always_left_to_train_on():
    names = [f"{i}" for i in (1, 101, 102, 103, 104)]
    draws = {frozenset(held_out(names, "number:50", fraction=0.9, seed=s)) for s in range(20)}
    assert draws == {frozenset(names[:1]), frozenset(names[1:])}


def test_the_draw_is_pinned():
    # The same on every machine and with every version: a resumed run must find its images again.
    names = [f"{i:03d}" for i in range(40)]
    assert sorted(held_out(names, "none", fraction=0.1, seed=7)) == ["019", "020", "027", "036"]


def test_one_group_cannot_be_held_out():
    with pytest.raises(
        BadInput, match=r"^data\.holdout_groups: .* all 3 training images are one group"
    ):
        held_out(["1", "2", "3"], "number:5", fraction=0.05, seed=0)


def pairs(n):
    """Returns the names of n parts under two exposures each."""
    return [f"part{i // 2:02d}_exp{i % 2}.png" for i in range(2 * n)]


def test_auto_keeps_the_exposures_of_a_part_together():
    names = pairs(10)
    assert resolve(names, "auto") == "number:0"
    assert groups(names, "auto") == [names[i : i + 2] for i in range(0, 20, 2)]
    assert len(held_out(names, "auto", fraction=0.05, seed=0)) == 2


@pytest.mark.parametrize(
    "names",
    [
        pairs(10),
        [f"a1_exp{i}.png" for i in range(20)],  # one part
        [f"a{i}_exp0.png" for i in range(20)],
        [f"a{i // 19 * 500}_exp{i}.png" for i in range(20)],  # two parts, one of one image
        [f"{i}{'9' * 200}_exp0.png" for i in range(20)],
    ],
)
def test_auto_never_takes_most_of_the_images(names):
    for seed in range(20):
        drawn = held_out(names, "auto", fraction=0.05, seed=seed)
        assert 0 < len(drawn) <= 2


def test_the_rule_is_known(tmp_path):
    root = category(tmp_path / "thing", train=8)
    for i, path in enumerate(sorted((root / "train/good").iterdir())):
        path.rename(path.with_name(pairs(4)[i]))
    spec = DatasetSpec("folder", str(root), "", (20, 24), "auto", str(tmp_path / "cache"))
    split = open_training(spec, holdout_fraction=0.1, seed=0)
    assert (split.holdout_rule, len(split.held_out)) == ("number:0", 2)
