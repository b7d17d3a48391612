"""From plain nested values to a job's dataclasses, checked: types, bounds, unknown keys.

`settings.py` declares the classes with `setting`, `hpcmlx.config` fills them from conf/ and command
line. A value that does not fit is refused with its key, what it is and what would be right.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, field, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from hpcmlx.errors import ConfigError
from hpcmlx.redact import written

T = TypeVar("T")


def setting(
    help: str,
    default: Any = MISSING,
    *,
    choices: tuple[Any, ...] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
) -> Any:
    """A configuration key: its help text, its default and the values it accepts.

    Bounds are `low <= value <= high` and `value > above`; for a list they hold for each element.
    A list default is copied for every instance.
    """
    limits = {"choices": choices, "low": low, "above": above, "high": high}
    metadata = {"help": help, **limits}
    if isinstance(default, list):
        items = list(default)
        return field(default_factory=lambda: list(items), metadata=metadata)
    return field(default=default, metadata=metadata)


def to_dict(cfg: Any) -> dict[str, Any]:
    """Plain JSON values for a broadcast; `from_dict` is the inverse.

    Interpolations are resolved in it, so it may hold an environment variable: what is saved is
    `hpcmlx.config.to_yaml`.
    """
    return asdict(cfg)


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build and check the configuration `cls` from plain nested values.

    Raises:
        ConfigError: an unknown or missing key, a value of the wrong type or out of range.
    """
    values = dict(values)
    unresolved = dict(values.pop("unresolved", {}))
    _refuse_unknown(cls, values, "")
    cfg = _convert(cls, values, "", unresolved)
    cfg.unresolved = unresolved
    cfg.check()
    return cfg


def config_hash(cfg: Any) -> str:
    """SHA-256 of what decides the results: everything but `run_dir`, `launch` and `sweep`."""
    values = to_dict(cfg)
    for key in ("run_dir", "resume", "launch", "sweep", "unresolved"):
        values.pop(key, None)
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def keys(cls: type) -> list[tuple[str, Any, Any]]:
    """Every key of the configuration `cls` as (dotted key, its type, its dataclass field)."""
    hints = get_type_hints(cls)
    found = []
    for item in fields(cls):
        if is_dataclass(hints[item.name]):
            found += [(f"{item.name}.{k}", t, f) for k, t, f in keys(hints[item.name])]
        elif item.metadata:
            found.append((item.name, hints[item.name], item))
    return found


def unknown_key(cls: type, key: str) -> ConfigError:
    """The refusal of `key`: the nearest valid key and the valid ones beside it."""
    valid = [k for k, _, _ in keys(cls)]
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.6)
    if not near:  # `temperature` for `sampling.temperature`
        near = [k for k in valid if k.rpartition(".")[2] == key.rpartition(".")[2]][:1]
    hint = f"; did you mean {near[0]}?" if near else ""
    group = key.partition(".")[0] + "."
    beside = [k for k in valid if k.startswith(group)]
    if not beside:
        beside = list(dict.fromkeys(k.partition(".")[0] for k in valid))
    return ConfigError(f"unknown key {key}{hint} (valid: {', '.join(beside)})")


def describe(kind: Any) -> str:
    """A type as a user reads it: `int`, `list of float`, `text or null`."""
    inner = [a for a in get_args(kind) if a is not type(None)]
    if get_origin(kind) is list:
        return f"list of {describe(inner[0])}"
    if inner:
        return f"{describe(inner[0])} or null"
    return {bool: "true or false", int: "int", float: "number", str: "text"}[kind]


def _refuse_unknown(cls: type, values: Mapping[Any, Any], prefix: str) -> None:
    valid = {k for k, _, _ in keys(cls)}
    groups = {k.rpartition(".")[0] for k in valid}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key not in valid and key not in groups:
            raise unknown_key(cls, key)
        if key in groups and isinstance(value, Mapping):
            _refuse_unknown(cls, value, f"{key}.")


def as_written(key: str, value: Any, shown: Mapping[str, str]) -> str:
    """`value` for a message; never what an interpolation has put there, which may be a secret."""
    return str(written(key, json.dumps(value, default=str), shown))


def _convert(kind: Any, value: Any, key: str, shown: Mapping[str, str]) -> Any:
    """`value` as type `kind`, or a ConfigError that names `key`.

    `shown` has the text to print in place of a value that came from an interpolation.
    """
    if is_dataclass(kind):
        return _convert_group(kind, value, key, shown)
    inner = [a for a in get_args(kind) if a is not type(None)]
    optional = len(inner) < len(get_args(kind))
    if optional:
        return None if value is None else _convert(inner[0], value, key, shown)
    if get_origin(kind) is list and isinstance(value, list):
        return [_convert(inner[0], v, f"{key}[{i}]", shown) for i, v in enumerate(value)]
    if kind in (str, bool) and isinstance(value, kind):
        return value
    # Text stands for a truth value or a number where an environment variable was interpolated.
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if kind in (int, float) and type(value) in (int, kind, str):
        try:
            return kind(value)
        except (ValueError, OverflowError):
            pass
    text = as_written(key, value, shown)
    hint = f" (quote it: {key}=\"'...'\")" if kind is str and isinstance(value, int | float) else ""
    raise ConfigError(f"{key}={text}: expected {describe(kind)}{hint}")


def _convert_group(cls: Any, value: Any, key: str, shown: Mapping[str, str]) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}={as_written(key, value, shown)}: expected a group of keys")
    prefix = f"{key}." if key else ""
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls) if f.name != "unresolved"}
    done = {}
    for name in value:
        done[name] = _convert(hints[name], value[name], f"{prefix}{name}", shown)
        _check_range(known[name], done[name], f"{prefix}{name}", shown)
    for name, item in known.items():
        if name in done or item.default is not MISSING or item.default_factory is not MISSING:
            continue
        if is_dataclass(hints[name]):
            done[name] = _convert(hints[name], {}, f"{prefix}{name}", shown)
        else:
            full = f"{prefix}{name}"
            raise ConfigError(f"{full} is not set; give {full}=… ({item.metadata['help']})")
    return cls(**done)


def _check_range(item: Any, value: Any, key: str, shown: Mapping[str, str]) -> None:
    """Refuse a value that its `setting` does not accept."""
    limits = item.metadata
    if not limits or value is None:
        return
    text = as_written(key, value, shown)
    if limits["choices"] and value not in limits["choices"]:
        choices = [str(choice) for choice in limits["choices"]]
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key}={text}: expected one of {', '.join(choices)}{hint}")
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, str | bool):
            continue
        low, above, high = limits["low"], limits["above"], limits["high"]
        if not math.isfinite(number):
            raise ConfigError(f"{key}={text}: expected a finite number")
        if low is not None and number < low:
            raise ConfigError(f"{key}={text}: must be at least {low}")
        if above is not None and number <= above:
            raise ConfigError(f"{key}={text}: must be greater than {above}")
        if high is not None and number > high:
            raise ConfigError(f"{key}={text}: must be at most {high}")
