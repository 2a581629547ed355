"""Lists of machines: what is understood, and one line for what is not."""
import pytest

from pyfleet.errors import ConfigError
from pyfleet.hosts import Host, parse_hosts, read_hostfile


@pytest.mark.parametrize("text,expected", [
    ("a", [Host("a")]),
    ("a, b:4", [Host("a"), Host("b", slots=4)]),
    ("ann@a.example.org:2,10.0.0.7", [Host("a.example.org", "ann", 2), Host("10.0.0.7")]),
    ("[fe80::1%eth0]:3,ann@[2001:db8::1]", [Host("fe80::1%eth0", slots=3), Host("2001:db8::1", "ann")]),
    ("a,a,b:2,a:3", [Host("a", slots=5), Host("b", slots=2)]),
    ("ann@a,bob@a", [Host("a", "ann"), Host("a", "bob")]),
])
def test_lists(text, expected):
    assert parse_hosts(text) == expected


@pytest.mark.parametrize("text,message", [
    ("", "names no host"), (",", "names no host"), ("a,,b", "empty entry"),
    ("a:", "slots must be a number from 1 to 65536, got '' (in --hosts a:)"),
    ("a:0", "slots must be a number"), ("a:many", "slots must be a number"), ("a:²", "slots must be a number"),
    ("fe80::1", "in brackets, such as [fe80::1]:4"), ("[fe80::1", "is not [user@]host[:slots]"), ("[a]", "is not [user@]host"),
    ("-oProxyCommand=reboot", "is not [user@]host[:slots]"), ("-l@a", "is not [user@]host"), ("a b", "is not [user@]host"),
    ("@a", "is not [user@]host"), ("a@b@c", "is not [user@]host"),
])
def test_lists_that_make_no_sense(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_hosts(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hostfile_in_both_notations(tmp_path):
    (tmp_path / "hosts").write_text("""# the lab
mini-1 slots=4      # the fast one
ann@mini-2 slots=2 max_slots=8

pi:1
[fe80::1]:2
cap max-slots=3
mini-1
""")
    assert read_hostfile(tmp_path / "hosts") == [
        Host("mini-1", slots=5), Host("mini-2", "ann", 2), Host("pi", slots=1), Host("fe80::1", slots=2), Host("cap", slots=3)]


@pytest.mark.parametrize("line,message", [
    ("a slot=4", "'slot=4' is not slots=N; did you mean slots?"),
    ("a 4", "'4' is not slots=N"),
    ("a slots=", "slots must be a number from 1 to 65536, got ''"),
    ("a:4 slots=4", "'a:4' says its slots already"),
    ("a slots=2 slots=3", "slots is said twice"),
    ("a slots=4 max_slots=2", "slots=4 is more than max_slots=2"),
    ("fe80::1 slots=2", "in brackets"),
])
def test_an_error_names_the_line(tmp_path, line, message):
    (tmp_path / "hosts").write_text(f"good\n\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        read_hostfile(tmp_path / "hosts")
    assert message in str(caught.value)
    assert str(caught.value).endswith(f"({tmp_path}/hosts, line 3)")


def test_hostfiles_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the hostfile .*: No such file"):
        read_hostfile(tmp_path / "none")
    (tmp_path / "empty").write_text("# nobody\n")
    with pytest.raises(ConfigError, match="names no host"):
        read_hostfile(tmp_path / "empty")
    (tmp_path / "noise").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_hostfile(tmp_path / "noise")


@pytest.mark.parametrize("host,here", [
    (Host("localhost"), True), (Host("127.0.0.1"), True), (Host("localhost", "ann"), False),
    (Host("192.0.2.1"), False), (Host("name.invalid"), False),
])
def test_which_names_are_this_machine_s(host, here):
    assert host.is_here() is here
