"""Config files: reading them, the runs that one stands for, and overrides on the command line."""

import ast
import copy
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadInput
from pae_jax.config import Config, from_config_dict, hint


def load(config_file: str, overrides: Sequence[str] = ()) -> Config:
    """Reads `configs/X.py[:arg]` and applies `--config.key=value` overrides.

    Args:
      config_file: the path of a file with `get_config(arg=None)`, and after a colon its argument.
      overrides: command-line words, each `--config.key=value`.

    Raises:
      BadInput: with one line that names the file or the key.
    """
    _, values, _ = _run(config_file)
    return from_config_dict(override(values, overrides))


def load_members(config_file: str, overrides: Sequence[str] = ()) -> dict[str, Config]:
    """The runs that `configs/X.py[:arg]` stands for, by name.

    A config file that defines `members(arg)` names the arguments that an argument such as "all"
    stands for, or returns None; any other file stands for one run, under the name "".

    Raises:
      BadInput: with one line that names the file or the key.
    """
    path, _, argument = config_file.partition(":")
    names = _read(path).get("members", lambda arg: None)(argument)
    if names is None:
        return {"": load(config_file, overrides)}
    return {name: load(f"{path}:{name}", overrides) for name in names}


def load_sweep(config_file: str, overrides: Sequence[str] = ()) -> list[tuple[str, int, Config]]:
    """Reads a config file that also has `sweep(add, arg)`; see `configs/ablation.py`.

    Returns:
      (variant, seed, config) of each member; overrides apply to all of them.

    Raises:
      BadInput: with one line that names the file or the key.
    """
    module, values, argument = _run(config_file)
    if "sweep" not in module:
        raise BadInput(f"{config_file}: defines no sweep")
    base = override(values, overrides)
    members: list[tuple[str, int, Config]] = []

    def add(variant: str, seed: int, changes: Mapping[str, Any]) -> None:
        words = [f"--config.{key}={value}" for key, value in changes.items()]
        members.append((variant, seed, from_config_dict(override(base, words))))

    module["sweep"](add, argument)
    return members


def _run(config_file: str) -> tuple[dict[str, Any], dict[str, Any], str | None]:
    """What a config file defines, the values it returns, and the argument behind its colon."""
    path, _, argument = config_file.partition(":")
    module = _read(path)
    try:
        values = module["get_config"](argument or None).to_dict()
    except ValueError as error:  # how a config file refuses its argument
        raise BadInput(f"{config_file}: {error}") from None
    return module, values, argument or None


def _read(path: str) -> dict[str, Any]:
    """What a config file defines."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such config file")
    try:
        module = runpy.run_path(path)
    except (SyntaxError, ImportError, OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None
    if "get_config" not in module:
        raise BadInput(f"{path}: defines no get_config")
    return module


def override(values: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """A copy of nested `values` with each word `--config.key=value` applied.

    A value is a Python literal, except that strings need no quotes and true and false may be
    written small. Types and limits are checked later, by `from_config_dict`.
    """
    values = copy.deepcopy(values)
    for word in words:
        key, equals, text = word.removeprefix("--config.").partition("=")
        if not word.startswith("--config.") or not equals:
            raise BadInput(f"{word}: expected --config.key=value")
        *sections, name = key.split(".")
        section: Any = values
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or name not in section:
            near = hint(name, section, key) if isinstance(section, dict) else ""
            raise BadInput(f"{key}: no such key{near}")
        if isinstance(section[name], dict):
            raise BadInput(f"{key}: is a section; set one of {', '.join(section[name])}")
        section[name] = text if isinstance(section[name], str) else _literal(text)
    return values


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text  # no literal: the type check will name the key
