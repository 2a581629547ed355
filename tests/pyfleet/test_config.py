"""Settings: one value per key, from the first source that has one, and a clear error for everything else."""
import copy
import json
import pickle
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from pyfleet.config import SECTIONS, ClusterConfig, NodeRole, TrainingConfig, host_and_port, load_config
from pyfleet.errors import ConfigError, FleetError

DEFAULTS = {
    TrainingConfig: {
        "epochs": 10, "batch_size": 128, "learning_rate": 0.1, "compression": "none", "topk_ratio": 0.1,
        "error_feedback": True, "accumulation_steps": 1, "clip_norm": None, "amp": False, "loss_scale": None,
        "checkpoint_every": 0, "checkpoint_dir": "checkpoints", "resume": "auto", "eval_steps": None, "seed": 42,
        "device": "auto", "strategy": "data_parallel", "sync_every": 1, "bucket_size_mb": 25.0, "progress": True,
    },
    ClusterConfig: {
        "role": NodeRole.AUTO, "master_addr": None, "master_port": 50051, "tensor_port": 50052, "gradient_port": 52416,
        "discovery_port": 52415, "discovery_enabled": True, "static_peers": (), "min_peers": 1, "peer_timeout": 30.0,
        "connection_timeout_ms": 5000, "max_retries": 3, "namespace": None, "psk": None, "psk_file": None,
        "encryption": "auto", "transport": "auto", "same_host": "auto", "timeout": 300.0, "congestion": None, "arena_bytes": None,
        "stripes": None, "home": None, "iface": None, "log_level": "warning",
    },
}
# A value for every key that differs from its default: as text, as YAML or JSON holds it, and as it is stored.
OTHERS = {
    "epochs": ("3", 3, 3), "batch_size": ("64", 64, 64), "learning_rate": ("1e-3", "1e-3", 0.001),
    "compression": ("topk_fp16", "topk_fp16", "topk_fp16"), "topk_ratio": ("1", 1, 1.0),
    "error_feedback": ("off", False, False), "accumulation_steps": ("4", 4, 4), "clip_norm": ("2", 2, 2.0),
    "amp": ("true", True, True), "loss_scale": ("1024", 1024, 1024.0), "checkpoint_every": ("2", 2, 2),
    "checkpoint_dir": ("runs/a", "runs/a", "runs/a"), "resume": ("never", "never", "never"),
    "eval_steps": ("200", 200, 200), "seed": ("0", 0, 0), "device": ("cuda:1", "cuda:1", "cuda:1"),
    "strategy": ("local_sgd", "local_sgd", "local_sgd"), "sync_every": ("8", 8, 8),
    "bucket_size_mb": ("0.5", 0.5, 0.5), "progress": ("no", False, False),
    "role": ("Master", "master", NodeRole.MASTER), "master_addr": ("10.0.0.1", "10.0.0.1", "10.0.0.1"),
    "master_port": ("1", 1, 1), "tensor_port": ("2", 2, 2), "gradient_port": ("65535", 65535, 65535),
    "discovery_port": ("0", 0, 0), "discovery_enabled": ("0", False, False),
    "static_peers": ("a, [fe80::1%eth0]:7,b.local:52415", ["a", "[fe80::1%eth0]:7", "b.local:52415"],
                     ("a", "[fe80::1%eth0]:7", "b.local:52415")),
    "min_peers": ("0", 0, 0),
    "peer_timeout": ("10", 10, 10.0), "connection_timeout_ms": ("250", 250, 250), "max_retries": ("0", 0, 0),
    "namespace": ("lab", "lab", "lab"), "psk": ("open sesame", "open sesame", "open sesame"),
    "psk_file": ("/k", "/k", "/k"), "encryption": ("OFF", False, "off"),
    "transport": ("shm", "shm", "shm"), "same_host": ("cma", "cma", "cma"), "timeout": ("1.5", 1.5, 1.5),
    "congestion": ("bbr", "bbr", "bbr"), "arena_bytes": ("4096", 4096, 4096), "stripes": ("3", 3, 3), "home": ("/h", "/h", "/h"),
    "iface": ("en0", "en0", "en0"), "log_level": ("debug", "debug", "debug"),
}
KEYS = [(cls, name) for cls, keys in DEFAULTS.items() for name in keys]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    """No setting of whoever runs the tests leaks into them."""
    for name in [f"PYFLEET_{name.upper()}" for _, name in KEYS] + ["PYFLEET_CONFIG", "PYFLEET_OVERRIDES"]:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("cls", DEFAULTS)
def test_keys_and_defaults_are_those_promised(cls):
    assert {f.name: getattr(cls(), f.name) for f in fields(cls)} == DEFAULTS[cls]


@pytest.mark.parametrize("cls,name", KEYS)
def test_every_key_has_an_environment_twin(cls, name, monkeypatch):
    text, _, stored = OTHERS[name]
    monkeypatch.setenv(f"PYFLEET_{name.upper()}", text)
    assert getattr(cls(), name) == stored
    assert {f.name: getattr(cls(), f.name) for f in fields(cls)} == DEFAULTS[cls] | {name: stored}


@pytest.mark.feature("S9")
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_every_key_loads_from_a_file(tmp_path, suffix):
    sections = {cls.SECTION: {name: OTHERS[name][1] for name in keys} for cls, keys in DEFAULTS.items()}
    path = tmp_path / f"fleet{suffix}"
    path.write_text(json.dumps(sections))       # JSON is YAML too
    for config in load_config(path):
        assert {f.name: getattr(config, f.name) for f in fields(config)} == {
            name: OTHERS[name][2] for name in DEFAULTS[type(config)]}


def test_yaml_as_people_write_it(tmp_path):
    path = tmp_path / "fleet.yaml"
    path.write_text("training:\n  learning_rate: 1e-3\n  clip_norm: null\ncluster:\n  encryption: off\n  role: MASTER\n")
    training, cluster = load_config(path)
    assert (training.learning_rate, training.clip_norm) == (0.001, None)
    assert (cluster.encryption, cluster.role) == ("off", NodeRole.MASTER)


@pytest.mark.feature("S35")
def test_precedence_override_argument_environment_file_default(tmp_path, monkeypatch):
    path = tmp_path / "fleet.yaml"
    path.write_text("training: {epochs: 2, batch_size: 2, seed: 2, sync_every: 2}\n")
    monkeypatch.setenv("PYFLEET_BATCH_SIZE", "3")
    monkeypatch.setenv("PYFLEET_SEED", "3")
    monkeypatch.setenv("PYFLEET_EPOCHS", "3")
    said = {"seed": 4, "epochs": 4}
    training, _ = load_config(path, ["training.epochs=5"], training=said)
    assert (training.epochs, training.seed, training.batch_size, training.sync_every) == (5, 4, 3, 2)
    assert training.accumulation_steps == 1
    assert said == {"seed": 4, "epochs": 4}


def test_what_the_launcher_hands_over_reaches_load_config_and_constructors(tmp_path, monkeypatch):
    path = tmp_path / "fleet.yaml"
    path.write_text("training: {epochs: 2, seed: 2}\ncluster: {timeout: 2}\n")
    monkeypatch.setenv("PYFLEET_CONFIG", str(path))
    monkeypatch.setenv("PYFLEET_OVERRIDES", '["training.seed=7", "timeout=8"]')
    for training in (load_config()[0], TrainingConfig()):
        assert (training.epochs, training.seed) == (2, 7)
    assert TrainingConfig(epochs=9, seed=9) == replace(TrainingConfig(), epochs=9, seed=7)
    assert load_config(overrides=["seed=1"])[0].seed == 1
    assert ClusterConfig().timeout == 8.0

    other = tmp_path / "other.yaml"
    other.write_text("training: {batch_size: 1}\n")
    assert load_config(other)[0].epochs == 10, "a path that is given replaces PYFLEET_CONFIG"


def test_a_finished_config_is_taken_whole_but_for_overrides(monkeypatch):
    mine = TrainingConfig(epochs=3)
    monkeypatch.setenv("PYFLEET_SEED", "5")
    training, _ = load_config(training=mine)
    assert training == mine
    assert load_config(training=mine, overrides=["seed=6"])[0].seed == 6
    assert mine.seed == 42


@pytest.mark.parametrize("name,text", [(name, text) for name in ("clip_norm", "namespace", "arena_bytes")
                                       for text in ("none", "NULL", "")])
def test_none_in_words(name, text, monkeypatch):
    cls = TrainingConfig if name == "clip_norm" else ClusterConfig
    monkeypatch.setenv(f"PYFLEET_{name.upper()}", text)
    assert getattr(cls(), name) is None


@pytest.mark.parametrize("name,value", [
    ("epochs", 0), ("epochs", 1.0), ("epochs", True), ("epochs", "3"), ("batch_size", -1), ("batch_size", None),
    ("learning_rate", 0), ("learning_rate", float("nan")), ("learning_rate", float("inf")), ("learning_rate", "0.1"),
    ("topk_ratio", 0), ("topk_ratio", 1.01), ("error_feedback", 1), ("clip_norm", 0), ("checkpoint_every", -1),
    ("seed", -1), ("device", "gpu"), ("device", "cuda:x"), ("compression", ""), ("compression", None), ("compression", 3),
    ("bucket_size_mb", 0), ("accumulation_steps", 10**400 * -1),
    ("role", "boss"), ("role", 1), ("master_port", 65536), ("master_port", -1), ("encryption", "maybe"),
    ("transport", "udp"), ("same_host", "shm"), ("timeout", 0), ("peer_timeout", -3), ("connection_timeout_ms", 0),
    ("max_retries", -1), ("arena_bytes", 0), ("log_level", "loud"), ("namespace", " "),
    ("static_peers", "a:0"), ("static_peers", ["a:b"]), ("static_peers", ["a", 3]), ("static_peers", 7),
    ("static_peers", [""]), ("static_peers", ["[::1"]), ("static_peers", ["a b"]), ("static_peers", ["http://a"]),
])
def test_values_out_of_range_are_refused_at_construction_and_assignment(name, value):
    cls = TrainingConfig if name in DEFAULTS[TrainingConfig] else ClusterConfig
    with pytest.raises(ConfigError, match=rf"^{cls.SECTION}\.{name} must be .*, got "):
        cls(**{name: value})
    config = cls()
    with pytest.raises(ConfigError):
        setattr(config, name, value)
    assert config == cls()


@pytest.mark.parametrize("text,expected", [
    ("mini", ("mini", 9)), (" mini.local:7 ", ("mini.local", 7)), ("192.0.2.1:65535", ("192.0.2.1", 65535)),
    ("[2001:db8::1]", ("2001:db8::1", 9)), ("[fe80::1%en0]:7", ("fe80::1%en0", 7)), ("::1", ("::1", 9)),
    ("2001:db8::1:7", ("2001:db8::1:7", 9)), ("fe80::1%en0", ("fe80::1%en0", 9)),
])
def test_a_peer_is_a_host_and_perhaps_a_port(text, expected):
    assert host_and_port(text, 9) == expected


@pytest.mark.parametrize("text", ["", ":7", "a:", "a:0", "a:65536", "a:7:8", "[::1", "::1]", "[a]:7", "a/b", "a@b", "a,b"])
def test_what_is_no_peer_is_refused(text):
    with pytest.raises(ValueError):
        host_and_port(text, 9)


def test_errors_name_the_value_the_rule_and_the_source(tmp_path, monkeypatch):
    path = tmp_path / "fleet.yaml"
    path.write_text("training: {batch_size: many}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value) == f"training.batch_size must be an integer >= 1, got 'many' (from {path})"
    with pytest.raises(ConfigError) as error:
        load_config(overrides=["training.batch_size=many"])
    assert str(error.value) == ("training.batch_size must be an integer >= 1, got 'many' "
                                "(from --override training.batch_size=many)")
    monkeypatch.setenv("PYFLEET_PEER_TIMEOUT", "soon")
    with pytest.raises(ConfigError) as error:
        ClusterConfig()
    assert str(error.value) == ("cluster.peer_timeout must be a number > 0, got 'soon' "
                                "(from the environment: PYFLEET_PEER_TIMEOUT)")
    assert isinstance(error.value, FleetError)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("text", ["maybe", "", "2", "tru"])
def test_booleans_are_strict(text, monkeypatch):
    monkeypatch.setenv("PYFLEET_AMP", text)
    with pytest.raises(ConfigError, match="true or false"):
        TrainingConfig()


@pytest.mark.feature("S9")
@pytest.mark.parametrize("content,message", [
    ("training: {batchsize: 3}", r"unknown key training\.batchsize in .*; did you mean batch_size\?"),
    ("trainning: {epochs: 3}", r"unknown section 'trainning' in .*; did you mean training\?"),
    ("epochs: 3", r"unknown section 'epochs' in .*; it belongs under training:"),
    ("training: [1, 2]", r"section 'training' in .* must hold keys and values, got \[1, 2\]"),
    ("- 1", r"must hold the sections training and cluster"),
    ("training: {epochs: [}", r"is not valid: .*line 1"),
    ("training: {3: 4}", r"unknown key training\.3"),
    (b"training: \xff\xfe", r"is not UTF-8 text"),
])
def test_files_that_are_wrong_say_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "fleet.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "# nothing\n", "training:\ncluster:\n", "{}"])
def test_files_that_say_nothing_change_nothing(tmp_path, content):
    path = tmp_path / "fleet.yaml"
    path.write_text(content)
    assert load_config(path) == (TrainingConfig(), ClusterConfig())


def test_missing_files_and_directories(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot read the config file"):
            load_config(path)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="is not valid"):
        load_config(tmp_path / "bad.json")


@pytest.mark.parametrize("override,message", [
    ("training.batchsize=3", r"unknown key 'training.batchsize' .*; did you mean training.batch_size\?"),
    ("ecpochs=3", r"did you mean epochs\?"),
    ("epochs", r"is written section.key=value"),
    ("cluster.epochs=3", r"unknown key 'cluster.epochs'"),
    ("=3", r"unknown key ''"),
])
def test_overrides_that_are_wrong_say_what_is_wrong(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=[override])


def test_overrides_may_hold_spaces_and_equals_signs():
    training, cluster = load_config(overrides=["checkpoint_dir = a=b", "cluster.role=WORKER"])
    assert (training.checkpoint_dir, cluster.role) == ("a=b", NodeRole.WORKER)


@pytest.mark.parametrize("text", ["[", '{"a": 1}', "[1]", "seed=1"])
def test_overrides_in_the_environment_are_a_list(text, monkeypatch):
    monkeypatch.setenv("PYFLEET_OVERRIDES", text)
    with pytest.raises(ConfigError, match="PYFLEET_OVERRIDES must be a JSON list"):
        load_config()


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"TrainingConfig has no setting 'epoch'; did you mean epochs\?"):
        TrainingConfig(epoch=3)
    with pytest.raises(ConfigError, match=r"did you mean batch_size\?"):
        TrainingConfig().batchsize = 3
    with pytest.raises(ConfigError, match="by name"):
        TrainingConfig(3)


def test_configs_copy_compare_and_travel():
    config = ClusterConfig(role="worker", timeout=3)
    assert config.role is NodeRole.WORKER
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config)):
        assert other == config
    assert replace(config, timeout=4) != config


def test_the_sections_are_disjoint_so_that_bare_keys_and_twins_are_unambiguous():
    names = [name for cls in SECTIONS.values() for name in cls.rules()]
    assert len(names) == len(set(names))


def test_importing_the_settings_is_light():
    script = ("import sys, pyfleet.config, pyfleet.placement; "
              "print([m for m in ('torch', 'numpy', 'yaml', 'asyncio') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
