"""What is derived from a shared secret, and what a secret may be."""
import base64
import hashlib

import pytest
from nacl import pwhash

from pyfleet.config import ClusterConfig
from pyfleet.errors import ConfigError
from pyfleet.identity.namespace import Namespace, derive, new_psk, read_psk

KEY = bytes(range(32))
TAG = "eee0e8173304d264eb5eb65612b27fa8"
HANDSHAKE_KEY = "c24d4ada2c091fc41d25b323059520a6d44ccf87f13b13ddb045697d14c921bd"
PASSPHRASE_TAG = "87a20dc5ae23570732b40bc5ba8232bc"


def test_equal_secrets_meet_and_all_others_are_strangers():
    members = [Namespace.from_psk(KEY.hex(), "lab"), Namespace.from_psk(f" {KEY.hex().upper()}\n", "lab")]
    members.append(Namespace.from_psk(base64.b64encode(KEY).decode(), "lab"))
    members.append(Namespace.from_psk(base64.urlsafe_b64encode(KEY).decode(), "lab"))
    assert len({(member.tag, member.key) for member in members}) == 1
    others = [Namespace.from_psk(KEY.hex()), Namespace.from_psk(KEY.hex(), "lab2"), Namespace.from_psk(new_psk(), "lab"),
              Namespace.from_psk("a passphrase", "lab"), Namespace.from_psk("a passphrase", "lab2"),
              Namespace.from_psk("a passphrasf", "lab"), Namespace.from_token(KEY, "lab"), Namespace.from_token(KEY)]
    found = [members[0], *others]
    assert len({one.tag for one in found}) == len({one.key for one in found}) == len(found)


def test_a_full_key_is_not_stretched_and_a_passphrase_is(monkeypatch):
    stretched = []
    plain = pwhash.argon2id.kdf

    def kdf(size, secret, salt, passes, memory):
        stretched.append((secret, passes, memory))
        return plain(size, secret, salt, 1, 8192)
    monkeypatch.setattr(pwhash.argon2id, "kdf", kdf)
    for psk in (new_psk(), base64.b64encode(KEY).decode()):
        Namespace.from_psk(psk)
    assert stretched == []
    for psk in ("correct horse battery", "z" * 64, "correct-horse-battery-staple-and-some-moree"):
        Namespace.from_psk(psk)
    assert [secret for secret, *_ in stretched] == [b"correct horse battery", b"z" * 64,
                                                    b"correct-horse-battery-staple-and-some-moree"]
    assert all(passes >= 3 and memory >= 64 << 20 for _, passes, memory in stretched)


def test_the_tag_is_no_plain_hash_and_tells_nothing_of_the_key():
    namespace = Namespace.from_psk("a passphrase", "lab")
    guesses = [b"a passphrase", b"lab", b"a passphraselab", b"laba passphrase"]
    digests = {getattr(hashlib, kind)(guess).hexdigest()[:32] for guess in guesses for kind in ("sha256", "sha3_256", "md5")}
    assert namespace.tag not in digests and len(namespace.tag) == 32
    assert bytes.fromhex(namespace.tag) not in namespace.key + namespace.root
    assert repr(namespace.root) not in repr(namespace) and namespace.root.hex() not in repr(namespace)


def test_spelling_of_unicode_does_not_matter():
    assert Namespace.from_psk("passwörter", "büro").key == Namespace.from_psk("passwo\u0308rter", "bu\u0308ro").key


def test_derived_keys_are_separate():
    made = [derive(KEY, "a", b"b", b"c"), derive(KEY, "a", b"bc"), derive(KEY, "ab", b"c"), derive(KEY, "a", b"", b"bc"),
            derive(KEY, "a"), derive(bytes(32), "a")]
    assert len(set(made)) == len(made)
    assert derive(KEY, "a", size=16) == derive(KEY, "a")[:16]


def test_derived_values_never_change():
    # Members of different releases must agree on these.
    namespace = Namespace.from_psk(KEY.hex(), "lab")
    assert (namespace.tag, namespace.key.hex()) == (TAG, HANDSHAKE_KEY)
    assert Namespace.from_psk("a passphrase", "lab").tag == PASSPHRASE_TAG


def test_where_a_psk_may_come_from(tmp_path):
    path = tmp_path / "psk"
    path.write_text(f"{KEY.hex()}\n")
    path.chmod(0o600)
    from_file = Namespace.configured(ClusterConfig(psk_file=str(path), namespace="lab"))
    assert from_file == Namespace.configured(ClusterConfig(psk=KEY.hex(), namespace="lab"))
    assert Namespace.configured(ClusterConfig()) is Namespace.configured(ClusterConfig(namespace="lab")) is None
    with pytest.raises(ConfigError, match="two PSKs"):
        Namespace.configured(ClusterConfig(psk="something", psk_file=str(path)))


@pytest.mark.parametrize(("name", "content"), [("PYFLEET_PSK", KEY.hex()), ("PYFLEET_PSK_FILE", None)])
def test_the_environment_may_say_it(tmp_path, monkeypatch, name, content):
    path = tmp_path / "psk"
    path.write_text(KEY.hex())
    path.chmod(0o640)
    monkeypatch.setenv(name, content or str(path))
    monkeypatch.setenv("PYFLEET_NAMESPACE", "lab")
    cluster = ClusterConfig()
    assert Namespace.configured(cluster) == Namespace.from_psk(KEY.hex(), "lab")
    assert KEY.hex() not in repr(cluster)


@pytest.mark.parametrize(("content", "mode", "match"), [
    (b"", 0o600, "is empty"), (b" \n", 0o600, "is empty"), (b"x" * 5000, 0o600, "longer than any PSK"),
    (b"\xff\xfe", 0o600, "not UTF-8"), (b"a passphrase", 0o604, "open to everybody"), (b"a passphrase", 0o602, "open to"),
])
def test_files_that_hold_no_usable_psk(tmp_path, content, mode, match):
    path = tmp_path / "psk"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=match) as caught:
        read_psk(path)
    assert "passphrase" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot read the PSK file"):
        read_psk(tmp_path / "missing")


def test_a_short_passphrase_is_refused_and_not_repeated():
    with pytest.raises(ConfigError, match="7 characters") as caught:
        Namespace.from_psk("sesame1")
    assert "sesame1" not in str(caught.value)
    with pytest.raises(ConfigError, match="not shown") as caught:
        ClusterConfig(psk=12345678)
    assert "12345678" not in str(caught.value)


def test_marks_are_of_one_message_by_the_members_of_one_namespace():
    ours, theirs = Namespace.from_psk(KEY.hex(), "a"), Namespace.from_psk(KEY.hex(), "b")
    marks = {ours.mark(b"x"), ours.mark(b"y"), ours.mark(b""), theirs.mark(b"x"), ours.tag, ours.key.hex()[:32]}
    assert len(marks) == 6
    assert ours.mark(b"x") == Namespace.from_psk(KEY.hex().upper(), "a").mark(b"x")
    assert len(bytes.fromhex(ours.mark(b"x"))) == 16


def test_who_wants_to_be_found_needs_a_secret():
    with pytest.raises(ConfigError, match="pyfleet keys psk"):
        Namespace.required(ClusterConfig(namespace="lab"))
    cluster = ClusterConfig(namespace="lab", psk=KEY.hex())
    assert Namespace.required(cluster) == Namespace.configured(cluster)


def test_new_keys_are_random_and_full():
    keys = {new_psk() for _ in range(10)}
    assert len(keys) == 10 and all(len(bytes.fromhex(key)) == 32 for key in keys)
