"""P1, open set: how a bucket of gradients becomes wire bytes. `base` says what a kind must do."""
from __future__ import annotations

import ast
import difflib
import inspect
import re
from importlib import import_module
from typing import Any

from pyfleet.compressors.base import ROUTES, Compressor
from pyfleet.config import nearest
from pyfleet.errors import ConfigError

COMPRESSORS = {
    "none": "pyfleet.compressors.none:NoCompression",
    "fp16": "pyfleet.compressors.half:Float16",
    "bf16": "pyfleet.compressors.half:BFloat16",
    "fp8": "pyfleet.compressors.fp8:Float8",
    "quantize": "pyfleet.compressors.quantize:Quantize",
    "sign": "pyfleet.compressors.sign:Sign",
    "topk": "pyfleet.compressors.topk:TopK",
    "random": "pyfleet.compressors.random:Random",
    "powersgd": "pyfleet.compressors.powersgd:PowerSGD",
}
# Other spellings -> (kind, parameters they stand for).
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "float16": ("fp16", {}), "half": ("fp16", {}), "bfloat16": ("bf16", {}), "float8": ("fp8", {}),
    **{f"int{bits}": ("quantize", {"num_bits": bits}) for bits in range(1, 9)},
}

__all__ = ["ALIASES", "COMPRESSORS", "ROUTES", "Compressor", "parse_spec"]

_PART = re.compile(r"\s*([A-Za-z][A-Za-z0-9]*)\s*(?:\(([^()]*)\))?\s*")
_WORDS = {"true": True, "false": False, "none": None}


def parse_spec(text: str | Compressor | None, **defaults: Any) -> Compressor:
    """The compressor that a specification names: "int8", "topk(ratio=0.01)", "quantize(num_bits=6)", "topk+fp16".

    A kind from COMPRESSORS or ALIASES, in any case, with parameters in brackets; after a "+" or "_", the kind that codes
    the values that the first one selects. A Compressor is returned as it is; None is "none".

    Args:    defaults: parameters for the kinds that have them, where the text says nothing, such as ratio=0.01.
    Raises:  ConfigError naming the nearest known kind or parameter, or the accepted range.
    """
    if isinstance(text, Compressor):
        return text
    if text is None:
        return parse_spec("none", **defaults)
    if not isinstance(text, str):
        raise ConfigError(f"a compression is named by a text such as 'topk+fp16', got {text!r}")
    parts = _split(text)
    if len(parts) > 2:
        raise ConfigError(f"compression {text!r} chains {len(parts)} kinds: at most two, what selects and what codes the values")
    values = _build(text, *parts[1], defaults, None) if len(parts) == 2 else None
    return _build(text, *parts[0], defaults, values)


def _split(text: str) -> list[tuple[str, dict[str, Any]]]:
    parts, at = [], 0
    while True:
        match = _PART.match(text, at)
        if not match:
            raise ConfigError(f"cannot read the compression {text!r}: write a kind, kind(key=value) or kind+kind; "
                              f"kinds are {', '.join(COMPRESSORS)}")
        parts.append((match[1].lower(), _parameters(text, match[2] or "")))
        at = match.end()
        if at == len(text):
            return parts
        if text[at] not in "+_":
            raise ConfigError(f"cannot read the compression {text!r} from {text[at:]!r} on")
        at += 1


def _parameters(text: str, inside: str) -> dict[str, Any]:
    found = {}
    for pair in filter(str.strip, inside.split(",")):
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        if not equals or not key.isidentifier() or not value:
            raise ConfigError(f"parameters of the compression {text!r} are written key=value, got {pair.strip()!r}")
        try:
            found[key] = _WORDS[value.lower()] if value.lower() in _WORDS else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def _build(text: str, word: str, said: dict[str, Any], defaults: dict[str, Any], values: Compressor | None) -> Compressor:
    kind, implied = ALIASES.get(word, (word, {}))
    if kind not in COMPRESSORS:
        known = [*COMPRESSORS, *ALIASES]
        hint = nearest(word, known)
        raise ConfigError(f"unknown compression {word!r}{f' in {text!r}' if word != text else ''}{hint}"
                          f"{'' if hint else ': one of ' + ', '.join(known)}")
    module, _, name = COMPRESSORS[kind].partition(":")
    cls = getattr(import_module(module), name)
    accepted = [key for key in inspect.signature(cls).parameters if key != "values"]
    for key in said:
        if key not in accepted or key in implied:
            offered = [each for each in accepted if each not in implied]
            close = difflib.get_close_matches(key, offered, n=1)
            raise ConfigError(f"{word} has no parameter {key!r}"
                              + (f"; did you mean {close[0]}?" if close else f": it takes {', '.join(offered) or 'none'}"))
    arguments = {key: value for key, value in defaults.items() if key in accepted} | implied | said
    if values is not None:
        if not cls.takes_values:
            raise ConfigError(f"{word} codes all values itself, so nothing can follow it in {text!r}")
        if values.takes_values or values.route == "own":
            raise ConfigError(f"{values.name} cannot code the values that {word} selects, in {text!r}")
        arguments["values"] = values
    return cls(**arguments)
