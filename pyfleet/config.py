"""P0: every setting of a run, and the only door to the process environment.

A value is taken from the first place that has one: `--override` (and PYFLEET_OVERRIDES), what the script itself passes,
the environment twin PYFLEET_<KEY>, the file (or PYFLEET_CONFIG), the default. Overrides come first because they are said
last, for one run, by the person who starts it.
"""
from __future__ import annotations

import difflib
import ipaddress
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from pyfleet.errors import ConfigError

CONFIG_VARIABLE = "PYFLEET_CONFIG"          # path of the file that every rank reads
OVERRIDES_VARIABLE = "PYFLEET_OVERRIDES"    # JSON list of "section.key=value"

_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}
_NONE = {"", "none", "null"}


def environment() -> Mapping[str, str]:
    """The process environment; everything else in the package reads it through here."""
    return os.environ


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the known word closest to this one, or '' when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


class NodeRole(str, Enum):
    """What a node does in the control plane. AUTO: the fleet elects a master."""

    AUTO = "auto"
    MASTER = "master"
    WORKER = "worker"

    def __str__(self) -> str:
        return self.value


# --- what a value may be ------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Rule:
    """What one key accepts: `accept` turns a value into the stored one or raises, `parse` does so for text."""

    expected: str
    accept: Callable[[Any], Any]
    parse: Callable[[str], Any]


def _integer(low: int, high: int | None = None) -> Rule:
    def accept(value: Any) -> int:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ValueError
        value = int(value)
        if value < low or (high is not None and value > high):
            raise ValueError
        return value
    expected = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    return Rule(expected, accept, lambda text: accept(int(text)))


def _number(low: float, high: float | None = None) -> Rule:
    """A finite number above `low`, and at most `high` where there is one."""
    def accept(value: Any) -> float:
        if isinstance(value, (bool, str)):
            raise TypeError
        value = float(value)
        if not math.isfinite(value) or value <= low or (high is not None and value > high):
            raise ValueError
        return value
    expected = f"a number > {low:g}" + ("" if high is None else f" and <= {high:g}")
    return Rule(expected, accept, lambda text: accept(float(text)))


def _flag() -> Rule:
    def accept(value: Any) -> bool:
        if not isinstance(value, bool):
            raise TypeError
        return value

    def parse(text: str) -> bool:
        word = text.strip().lower()
        if word not in _TRUE | _FALSE:
            raise ValueError
        return word in _TRUE
    return Rule("true or false", accept, parse)


def _text(expected: str = "a non-empty string", pattern: str = r".*\S.*") -> Rule:
    def accept(value: Any) -> str:
        value = os.fspath(value)
        if not isinstance(value, str) or not re.fullmatch(pattern, value, re.DOTALL):
            raise ValueError
        return value
    return Rule(expected, accept, accept)


def host_and_port(text: str, default_port: int) -> tuple[str, int]:
    """The two halves of "host", "host:port", "[IPv6]", "[IPv6]:port" or a bare IPv6 address.

    Raises:  ValueError for anything else.
    """
    text = text.strip()
    match = re.fullmatch(r"(?:\[([^\]]+)\]|([^\s:\[\]@/,]+))(?::(\d{1,5}))?", text)
    bracketed, plain, port = match.groups() if match else (text, None, None)
    if bracketed is not None:
        ipaddress.IPv6Address(bracketed)
    if port is not None and not 1 <= int(port) <= 65535:
        raise ValueError(text)
    return bracketed or plain, default_port if port is None else int(port)


def _peers() -> Rule:
    """A list of host[:port]; in text, separated by commas."""
    def accept(value: Any) -> tuple[str, ...]:
        if isinstance(value, str):
            value = [] if value.strip().lower() in _NONE else value.split(",")
        if not isinstance(value, (list, tuple)) or not all(isinstance(peer, str) for peer in value):
            raise TypeError
        peers = tuple(dict.fromkeys(peer.strip() for peer in value))
        for peer in peers:
            host_and_port(peer, 1)
        return peers
    return Rule("a list of host or host:port, IPv6 in brackets", accept, accept)


def _one_of(*words: str, make: Callable[[str], Any] = str) -> Rule:
    def accept(value: Any) -> Any:
        if isinstance(value, bool):         # YAML reads a bare on/off as a boolean
            value = "on" if value else "off"
        if isinstance(value, Enum):
            value = value.value
        if not isinstance(value, str) or value.strip().lower() not in words:
            raise ValueError
        return make(value.strip().lower())
    return Rule("one of " + ", ".join(words), accept, accept)


def _maybe(rule: Rule) -> Rule:
    return Rule(f"{rule.expected}, or none",
                lambda value: None if value is None else rule.accept(value),
                lambda text: None if text.strip().lower() in _NONE else rule.parse(text))


def _key(default: Any, rule: Rule, *, secret: bool = False) -> Any:
    return field(default=default, repr=not secret, metadata={"rule": rule, "secret": secret})


_PORT = _integer(0, 65535)                  # 0: any free one


class _Settings:
    """A section of settings: checks every assignment, and fills the keys that were not given."""

    SECTION = ""

    def __new__(cls, *positional: Any, **given: Any) -> Any:
        if positional:
            raise ConfigError(f"{cls.__name__} takes its settings by name, for example {cls.__name__}"
                              f"({fields(cls)[0].name}={fields(cls)[0].default!r})")
        for name in given:
            if name not in cls.rules():
                raise ConfigError(f"{cls.__name__} has no setting {name!r}{nearest(name, cls.rules())}")
        self = super().__new__(cls)
        object.__setattr__(self, "_given", frozenset(given))
        return self

    def __post_init__(self) -> None:
        self._fill(None, ())

    def __setattr__(self, name: str, value: Any) -> None:
        self._put(name, value, "")

    @classmethod
    def rules(cls) -> dict[str, Rule]:
        """What each key accepts."""
        return {f.name: f.metadata["rule"] for f in fields(cls)}

    def _put(self, name: str, value: Any, source: str) -> None:
        """Check and store; text from a source (a file, a variable, an override) is parsed, text from the script is not."""
        rule = self.rules().get(name)
        if rule is None:
            raise ConfigError(f"{self.SECTION} has no setting {name!r}{nearest(name, self.rules())}{source}")
        try:
            stored = rule.parse(value) if source and isinstance(value, str) else rule.accept(value)
        except (ValueError, TypeError, OverflowError):
            if next(f.metadata["secret"] for f in fields(self) if f.name == name):
                raise ConfigError(f"{self.SECTION}.{name} must be {rule.expected}; what it is, is not shown") from None
            raise ConfigError(f"{self.SECTION}.{name} must be {rule.expected}, got {value!r}{source}") from None
        object.__setattr__(self, name, stored)

    def _fill(self, path: str | os.PathLike | None, overrides: Iterable[str]) -> None:
        """Take the keys that were not given from the environment or the file, and let the overrides have the last word."""
        for name, (value, source) in _ambient(path, type(self)).items():
            if name not in self._given:
                self._put(name, value, source)
        for section, name, value, source in _parse_overrides([*ambient_overrides(), *overrides]):
            if section == self.SECTION:
                self._put(name, value, source)

    @classmethod
    def _load(cls, said: Any, path: str | os.PathLike | None, overrides: Iterable[str]) -> Any:
        """As the constructor with the keys of `said`, reading `path` in place of PYFLEET_CONFIG."""
        said = {name: getattr(said, name) for name in cls.rules()} if isinstance(said, cls) else dict(said or {})
        self = cls.__new__(cls, **said)
        for each in fields(cls):
            self._put(each.name, said.get(each.name, each.default), "")
        self._fill(path, overrides)
        return self


@dataclass(kw_only=True)
class TrainingConfig(_Settings):
    """What is trained, and how. Values out of range raise ConfigError, at construction and at every assignment."""

    SECTION = "training"

    epochs: int = _key(10, _integer(1))                         # passes over the dataset
    batch_size: int = _key(128, _integer(1))                    # samples of one step over all ranks; split by weight
    learning_rate: float = _key(0.1, _number(0))
    compression: str = _key("none", _text())                    # a compressor or a chain: topk, fp16, bf16, int8, topk_fp16
    topk_ratio: float = _key(0.1, _number(0, 1))                # share of the gradient that topk and random keep
    error_feedback: bool = _key(True, _flag())                  # send later what a lossy compressor left out
    accumulation_steps: int = _key(1, _integer(1))              # micro-batches between two synchronisations
    clip_norm: float | None = _key(None, _maybe(_number(0)))    # greatest norm of the whole gradient
    amp: bool = _key(False, _flag())                            # mixed precision: half-width forward and backward
    loss_scale: float | None = _key(None, _maybe(_number(0)))   # None: found by itself when amp needs one
    checkpoint_every: int = _key(0, _integer(0))                # epochs; 0: never
    checkpoint_dir: str = _key("checkpoints", _text())
    resume: str = _key("auto", _text())                         # auto: the newest checkpoint if any; never; or a path
    eval_steps: int | None = _key(None, _maybe(_integer(1)))    # steps between evaluations; None: after each epoch
    seed: int = _key(42, _integer(0))
    device: str = _key("auto", _text("auto, cpu, cuda, cuda:N or mps", r"auto|cpu|cuda(:\d+)?|mps"))
    strategy: str = _key("data_parallel", _text())              # when and what is synchronised
    sync_every: int = _key(1, _integer(1))                      # local steps between two synchronisations
    bucket_size_mb: float = _key(25.0, _number(0))              # gradients sent together, MB of 10^6 bytes
    progress: bool = _key(True, _flag())                        # a progress bar on rank 0


@dataclass(kw_only=True)
class ClusterConfig(_Settings):
    """Who takes part, and how they reach each other. Values out of range raise ConfigError, as in TrainingConfig."""

    SECTION = "cluster"

    role: NodeRole = _key(NodeRole.AUTO, _one_of("auto", "master", "worker", make=NodeRole))    # noqa: RUF009
    master_addr: str | None = _key(None, _maybe(_text()))
    master_port: int = _key(50051, _PORT)                       # control messages
    tensor_port: int = _key(50052, _PORT)                       # bulk tensors
    gradient_port: int = _key(52416, _PORT)                     # links between hosts
    discovery_port: int = _key(52415, _PORT)
    discovery_enabled: bool = _key(True, _flag())               # False: not one mDNS packet
    static_peers: tuple[str, ...] = _key((), _peers())          # host[:port] of nodes that multicast does not reach
    min_peers: int = _key(1, _integer(0))                       # others to find before training starts
    peer_timeout: float = _key(30.0, _number(0))                # seconds to find them in
    connection_timeout_ms: int = _key(5000, _integer(1))        # one attempt to connect
    max_retries: int = _key(3, _integer(0))                     # attempts after the first
    namespace: str | None = _key(None, _maybe(_text()))         # with whom: strangers to any other name
    psk: str | None = _key(None, _maybe(_text()), secret=True)  # 32 bytes in hex or base64, or a passphrase
    psk_file: str | None = _key(None, _maybe(_text()))          # a file that holds it
    encryption: str = _key("auto", _one_of("auto", "on", "off"))        # of links; auto: between hosts
    transport: str = _key("auto", _one_of("auto", "shm", "tcp"))
    same_host: str = _key("auto", _one_of("auto", "cma", "staging"))    # how ordinary memory is read between local ranks
    timeout: float = _key(300.0, _number(0))                    # seconds; default deadline of a collective
    congestion: str | None = _key(None, _maybe(_text()))        # TCP congestion control, by its kernel name
    arena_bytes: int | None = _key(None, _maybe(_integer(1)))   # shared memory of a host; None: by need
    stripes: int | None = _key(None, _maybe(_integer(1, 4)))    # connections per link; None: 4 above 10 Gbit/s, else 1
    home: str | None = _key(None, _maybe(_text()))              # where this node's key lives; None: ~/.pyfleet
    iface: str | None = _key(None, _maybe(_text()))             # network interface to use; None: the best measured
    log_level: str = _key("warning", _one_of("debug", "info", "warning", "error", "critical"))


SECTIONS: dict[str, type[_Settings]] = {cls.SECTION: cls for cls in (TrainingConfig, ClusterConfig)}


def load_config(
    path: str | os.PathLike | None = None,
    overrides: Iterable[str] = (),
    training: TrainingConfig | Mapping[str, Any] | None = None,
    cluster: ClusterConfig | Mapping[str, Any] | None = None,
) -> tuple[TrainingConfig, ClusterConfig]:
    """Both sections, from every source, in the order of precedence the module states.

    Args:    path: YAML or JSON with the sections `training` and `cluster`; None reads PYFLEET_CONFIG, if it is set.
             overrides: "training.batch_size=64"; a bare key will do. Applied after those of PYFLEET_OVERRIDES.
             training, cluster: what the script itself says, as keys and values; a finished config is taken whole.
    Raises:  ConfigError naming the key, the value, what is allowed, and where the value came from.
    """
    overrides = list(overrides)
    return TrainingConfig._load(training, path, overrides), ClusterConfig._load(cluster, path, overrides)


def read_file(path: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """The sections of a YAML or JSON file, their keys known, their values not yet checked."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            content = json.loads(text) if text.strip() else {}
        else:
            content = _read_yaml(text)
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the config file {path} is not UTF-8 text") from None
    except ValueError as error:
        raise ConfigError(f"the config file {path} is not valid: {' '.join(str(error).split())}") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"the config file {path} must hold the sections {' and '.join(SECTIONS)}")
    for section, values in content.items():
        if section not in SECTIONS:
            homes = [f"{home}.{section}" for home, cls in SECTIONS.items() if section in cls.rules()]
            hint = f"; it belongs under {homes[0].split('.')[0]}:" if homes else nearest(str(section), SECTIONS)
            raise ConfigError(f"unknown section {section!r} in {path}{hint}")
        if values is not None and not isinstance(values, dict):
            raise ConfigError(f"section {section!r} in {path} must hold keys and values, got {values!r}")
        for name in values or {}:
            if name not in SECTIONS[section].rules():
                raise ConfigError(f"unknown key {section}.{name} in {path}{nearest(str(name), SECTIONS[section].rules())}")
    return {section: values or {} for section, values in content.items()}


def _read_yaml(text: str) -> Any:
    import yaml  # only who has a file pays for it

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from None


def _ambient(path: str | os.PathLike | None, cls: type[_Settings]) -> dict[str, tuple[Any, str]]:
    """key -> (value, where it came from), the environment over the file; no path means PYFLEET_CONFIG."""
    path = path if path is not None else environment().get(CONFIG_VARIABLE) or None
    content = read_file(path).get(cls.SECTION, {}) if path is not None else {}
    found = {name: (value, f" (from {path})") for name, value in content.items()}
    for name in cls.rules():
        variable = f"PYFLEET_{name.upper()}"
        if variable in environment():
            found[name] = (environment()[variable], f" (from the environment: {variable})")
    return found


def ambient_overrides() -> list[str]:
    """The overrides that the launcher handed to this process."""
    text = environment().get(OVERRIDES_VARIABLE)
    if not text:
        return []
    try:
        overrides = json.loads(text)
        if not isinstance(overrides, list) or not all(isinstance(entry, str) for entry in overrides):
            raise ValueError
    except ValueError:
        raise ConfigError(f"{OVERRIDES_VARIABLE} must be a JSON list of 'section.key=value', got {text!r}") from None
    return overrides


def _parse_overrides(overrides: Iterable[str]) -> list[tuple[str, str, str, str]]:
    """(section, key, text, where it came from) of each override."""
    parsed = []
    known = {f"{section}.{name}" for section, cls in SECTIONS.items() for name in cls.rules()}
    for entry in overrides:
        name, equals, value = entry.partition("=")
        name = name.strip()
        if not equals:
            raise ConfigError(f"an override is written section.key=value, got {entry!r}")
        homes = [full for full in known if full == name or full.split(".")[1] == name]
        if not homes:
            hint = nearest(name, known) or nearest(name, [full.split(".")[1] for full in known])
            raise ConfigError(f"unknown key {name!r} in --override {entry}{hint}")
        section, key = homes[0].split(".")
        parsed.append((section, key, value.strip(), f" (from --override {entry})"))
    return parsed
