"""Config files: finding and reading them, `--config.key=value` overrides, and the runs they define.

A config file defines `get_config(arg=None)`, which returns a ConfigDict with the keys of
`configs/default.py`. It may also define:

    derive(config, arg)   fills in values that follow from other keys; it runs after the overrides
    members(arg)          arguments of several runs that an argument such as "all" stands for
    sweep(add, arg)       the variants of a sweep
"""

import ast
import contextlib
import copy
import os
import runpy
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from data_pipelines.errors import BadInput, first_line
from pae_jax.config import Config, check, from_config_dict
from pae_jax.config_schema import unknown_key
from pae_jax.configs import DIRECTORY


def load(config_file: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file and applies overrides.

    Args:
      config_file: a path or the name of a shipped config, and after a colon its argument.
      overrides: words of the command line, each `--config.key=value`.

    Returns:
      The configuration of one run.

    Raises:
      BadInput: with one line that names the file or the key.
    """
    return _load(_Source(*locate(config_file), config_file), overrides)


def load_members(config_file: str, overrides: Sequence[str] = ()) -> dict[str, Config]:
    """Reads a config file whose argument may stand for several runs, such as "all".

    Args:
      config_file: see `load`.
      overrides: see `load`; they apply to every run.

    Returns:
      Name → configuration of each run. A file without `members`, or whose `members(arg)` is None,
      defines a single run with the name "".

    Raises:
      BadInput: with one line that names the file or the key.
    """
    source = _Source(*locate(config_file), config_file)
    module = _read(source.path)
    with _mistakes_named(source):
        names = module.get("members", lambda arg: None)(source.argument or "")
    if names is None:
        return {"": _load(source, overrides)}
    path = source.path
    return {name: _load(_Source(path, name, f"{path}:{name}"), overrides) for name in names}


def load_sweep(config_file: str, overrides: Sequence[str] = ()) -> list[tuple[str, int, Config]]:
    """Reads a config file that also defines `sweep(add, arg)`; see `configs/ablation.py`.

    Args:
      config_file: see `load`.
      overrides: see `load`; they apply to every run.

    Returns:
      (variant, seed, config) of each run.

    Raises:
      BadInput: with one line that names the file or the key.
    """
    source = _Source(*locate(config_file), config_file)
    module, values = _run(source)
    if "sweep" not in module:
        raise BadInput(f"{config_file}: defines no sweep")
    base = override(values, overrides)
    members: list[tuple[str, int, Config]] = []

    def add(variant: str, seed: int, changes: Mapping[str, Any]) -> None:
        # The changes become words, so that they are parsed and checked like a command line.
        words = [f"--config.{key}={value}" for key, value in changes.items()]
        members.append((variant, seed, _finish(module, base, words, source)))

    with _mistakes_named(source):
        module["sweep"](add, source.argument)
    return members


def shipped() -> dict[str, str]:
    """Returns the name and the first line of the docstring of each shipped config file."""
    summaries = {}
    # Names that begin with a letter, because __init__.py is no config file.
    for path in sorted(DIRECTORY.glob("**/[a-z]*.py")):
        # Parsed but not run, because the config files import heavy packages.
        tree = ast.parse(path.read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if "get_config" in functions:
            name = path.relative_to(DIRECTORY).with_suffix("").as_posix()
            summaries[name] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return summaries


def locate(config_file: str) -> tuple[Path, str | None]:
    """Returns the path of a config file, and the argument after its colon or None.

    Args:
      config_file: PATH[:ARGUMENT], or NAME[:ARGUMENT] with the name of a shipped config.

    Raises:
      BadInput: there is no such file and no such config.
    """
    # A path may itself hold colons, so the longest name that is a file is taken.
    parts = config_file.split(":")
    for end in range(len(parts), 0, -1):
        name, argument = ":".join(parts[:end]), ":".join(parts[end:])
        for path in (Path(name), DIRECTORY / f"{name}.py"):
            if os.path.isfile(path):  # False also for names that no file can have
                return path, argument or None
    # The colons of a path are not taken for an argument's.
    name = config_file if {"/", "\\"} & set(config_file) else parts[0]
    raise BadInput(f"{name}: no such config file, and no shipped config; `pae configs` lists them")


def override(values: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Returns a copy of nested `values` with each word `--config.key=value` applied.

    A value is a Python literal, except that strings need no quotes and true and false may be
    written in lower case. Types and limits are checked later, by `config.check`.

    Args:
      values: nested dictionaries.
      words: words of the command line.

    Raises:
      BadInput: for a word of another form or a key that `values` does not have.
    """
    # The variants of a sweep all start from the same values, which must not change.
    values = copy.deepcopy(values)
    data = values.get("data", {})
    if any(word.startswith("--config.data.size=") for word in words) and "size" in data:
        # A size in the overrides sets both sides, also if the file sets them one by one.
        data["height"] = data["width"] = None
    for word in words:
        key, equals, text = word.removeprefix("--config.").partition("=")
        if not word.startswith("--config.") or not equals:
            raise BadInput(f"{word}: expected --config.key=value")
        *sections, name = key.split(".")
        section: Any = values
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or name not in section:
            raise unknown_key(key, section)
        if isinstance(section[name], dict):
            raise BadInput(f"{key}: is a section; set one of {', '.join(section[name])}")
        # A string is taken literally, so that a folder with the name 2024 does not become a number.
        section[name] = text if isinstance(section[name], str) else _literal(text)
    return values


class _Source(NamedTuple):
    """A config file with its argument, and the words by which the user named both."""

    path: Path
    argument: str | None
    name: str


def _load(source: _Source, overrides: Sequence[str]) -> Config:
    """Returns the config of a located file; see `load`."""
    return _finish(*_run(source), overrides, source)


def _run(source: _Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the names that a config file defines and the values of its config."""
    module = _read(source.path)
    with _mistakes_named(source):
        return module, module["get_config"](source.argument).to_dict()


def _read(path: Path) -> dict[str, Any]:
    """Returns the names that a config file defines."""
    with _mistakes_named(_Source(path, None, str(path))):
        try:
            # Executed rather than imported, because the file need not be on the import path.
            module = runpy.run_path(str(path))
        except (SyntaxError, ImportError, OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{path}: cannot be read ({error})") from None
    if "get_config" not in module:
        raise BadInput(f"{path}: defines no get_config")
    return module


@contextlib.contextmanager
def _mistakes_named(source: _Source) -> Iterator[None]:
    """Turns keys and values that a config file cannot set into one line with the file's line.

    Other errors are mistakes inside the file, which their traceback shows.
    """
    try:
        yield
    except BadInput:
        raise
    except ValueError as error:  # config files refuse an argument by a ValueError
        raise BadInput(f"{source.name}: {error}") from None
    except (TypeError, KeyError, AttributeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if "ml_collections" not in frames[-1].filename:
            raise
        lines = [frame.lineno for frame in frames if frame.filename == str(source.path)]
        where = f"{source.name}: line {lines[-1]}: " if lines else f"{source.name}: "
        raise BadInput(where + first_line(error, 300).strip("'\"")) from None


def _finish(
    module: Mapping[str, Any],
    values: dict[str, Any],
    words: Sequence[str],
    source: _Source,
) -> Config:
    """Returns the config after the overrides and the file's `derive`."""
    values = override(values, words)
    if "derive" in module:
        # Checked first, because `derive` computes with the values that the user gave.
        config = ConfigDict(check(values))
        with _mistakes_named(source):
            module["derive"](config, source.argument)
        values = config.to_dict()
    return from_config_dict(values)


def _literal(text: str) -> Any:
    """Returns the value of a Python literal, or the text itself; the type check follows later."""
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text
