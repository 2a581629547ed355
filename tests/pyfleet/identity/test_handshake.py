"""The handshake, message by message: only the one right conversation succeeds, and every other one fails on both ends."""
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyfleet.errors import AuthFailed
from pyfleet.identity import Initiator, Namespace, NodeKey, Purpose, Responder, ciphers, handshake
from pyfleet.identity.handshake import ANSWER_BYTES, HELLO_BYTES, PROOF_BYTES, WELCOME_BYTES, Kind

LAB = Namespace.from_psk("00" * 32, "lab")
ALICE, BOB, EVE = (NodeKey.from_seed(bytes([k] * 32)) for k in (1, 2, 3))
SEALED = ciphers.CHACHA20_POLY1305 | ciphers.AEGIS_128L
MEETING = b"meeting of today"
PURPOSE = Purpose(Kind.DATA, 3, 1, epoch=5, group=2, meeting=MEETING)
ADMITS = {(Kind.DATA, 3): SEALED}
SIZES = (HELLO_BYTES, ANSWER_BYTES, PROOF_BYTES, WELCOME_BYTES)


def initiator(key=ALICE, namespace=LAB, purpose=PURPOSE, offers=SEALED, expects=None):
    return Initiator(key, namespace, purpose, offers, expects)


def responder(key=BOB, namespace=LAB, admits=None, *, to_rank=1, epoch=5, group=2, meeting=MEETING):
    return Responder(key, namespace, ADMITS if admits is None else admits, to_rank=to_rank, epoch=epoch, group=group,
                     meeting=meeting)


def converse(one, other, change=lambda number, message: message):
    """Carry messages, each through `change`; the four as they were sent. Raises what either end raises."""
    sent = [one.hello]
    sent.append(other.receive(change(0, sent[0])))
    sent.append(one.receive(change(1, sent[1])))
    other.receive(change(2, sent[2]))
    assert other.session is not None, "the responder waits for more"
    sent.append(other.welcome())
    one.receive(change(3, sent[3]))
    return sent


def fails(one, other, change=lambda number, message: message):
    """Whether the conversation ends without the initiator being let in; which end noticed, and why."""
    try:
        converse(one, other, change)
    except (AuthFailed, AssertionError) as error:
        assert one.session is None
        return str(error)
    return None


def test_both_ends_agree_on_everything():
    one, other = initiator(), responder()
    sent = converse(one, other)
    assert [len(message) for message in sent] == list(SIZES)
    mine, theirs = one.session, other.session
    assert (mine.peer, theirs.peer, theirs.peer_id) == (BOB.public, ALICE.public, ALICE.peer_id)
    assert mine.purpose == theirs.purpose == PURPOSE
    assert mine.cipher == theirs.cipher == ciphers.AEGIS_128L
    assert (mine.send_key, mine.receive_key) == (theirs.receive_key, theirs.send_key)
    assert len({mine.send_key, mine.receive_key, mine.binding[:16]}) == 3 and len(mine.send_key) == 16
    assert mine.binding == theirs.binding and len(mine.binding) == 32
    assert one.wants == other.wants == 0
    shown = repr(mine)
    assert all(secret.hex() not in shown and repr(secret) not in shown
               for secret in (mine.send_key, mine.receive_key, mine.binding))


def test_every_conversation_has_its_own_keys():
    seen = set()
    for _ in range(10):
        one, other = initiator(), responder()
        converse(one, other)
        seen |= {one.session.send_key, one.session.receive_key, one.session.binding}
    assert len(seen) == 30


def test_pieces_of_any_size_will_do():
    one, other = initiator(), responder()

    def feed(party, message):
        replies = []
        for k in range(len(message)):
            assert party.wants == len(message) - k
            replies.append(party.receive(message[k:k + 1]))
        assert not any(replies[:-1])
        return replies[-1]
    proof = feed(one, feed(other, one.hello))
    assert feed(other, proof) == b"" and feed(one, other.welcome()) == b""
    assert one.session.binding == other.session.binding


@pytest.mark.parametrize(("number", "size"), list(enumerate(SIZES)))
def test_every_flipped_byte_is_noticed(number, size):
    for at in range(size):
        for flip in (0x01, 0x80, 0xFF):
            def change(which, message, at=at, flip=flip):
                return message[:at] + bytes([message[at] ^ flip]) + message[at + 1:] if which == number else message
            assert fails(initiator(), responder(), change), (at, flip)


@pytest.mark.parametrize("number", range(4))
def test_a_truncated_message_is_never_the_whole_and_a_longer_one_is_refused(number):
    def cut(which, message):
        return message[:-1] if which == number else message

    def grow(which, message):
        return message + b"x" if which == number else message
    assert fails(initiator(), responder(), cut) or number == 3          # the last one: the initiator waits on
    one = initiator()
    fails(one, responder(), cut)
    assert one.session is None
    assert "said more than it was asked" in fails(initiator(), responder(), grow)


@pytest.mark.parametrize("number", range(4))
def test_recorded_messages_fit_no_other_conversation(number):
    recorded = converse(initiator(), responder())

    def replay(which, message):
        return recorded[which] if which == number else message
    assert fails(initiator(), responder(), replay)


def test_a_replayed_hello_gets_nowhere():
    recorded = converse(initiator(), responder())
    other = responder()
    answer = other.receive(recorded[0])
    assert answer != recorded[1] and other.session is None
    with pytest.raises(AuthFailed):
        other.receive(recorded[2])
    assert other.session is None and other.wants == 0


def test_messages_out_of_order_or_sent_back_are_refused():
    sent = converse(initiator(), responder())
    for make, first in ((initiator, 1), (responder, 0)):
        for number, message in enumerate(sent):
            if number != first:                                         # cut or repeated to the size that is awaited
                end = make()
                with pytest.raises(AuthFailed):
                    end.receive((message * 10)[:end.wants])
    one = initiator()                                                   # its own hello, filled up to what it awaits
    with pytest.raises(AuthFailed):
        one.receive((one.hello * 2)[:ANSWER_BYTES])
    one, other = initiator(), responder()                               # the own proof back as the answer's
    proof = one.receive(other.receive(one.hello))
    again = initiator()
    with pytest.raises(AuthFailed):
        again.receive(bytes(32) + bytes([ciphers.AEGIS_128L]) + proof)
    one, other = initiator(), responder()
    one.receive(other.receive(one.hello))
    with pytest.raises(AuthFailed):
        one.receive(one.hello[:WELCOME_BYTES])


def test_a_mirror_is_no_peer():
    # Eve answers Alice with what Alice says in other conversations that Eve opens towards her.
    one, alice_too = initiator(), responder(ALICE)
    with pytest.raises(AuthFailed):
        one.receive(alice_too.receive(initiator(EVE).hello))


@pytest.mark.feature("P30")
@pytest.mark.parametrize("other", [Namespace.from_psk("01" * 32, "lab"), Namespace.from_psk("00" * 32, "other"),
                                   Namespace.from_psk("00" * 32), Namespace.from_token(bytes(32), "lab")])
def test_another_psk_or_namespace_is_refused_at_the_first_message(other):
    assert "another PSK or namespace" in fails(initiator(namespace=other), responder())
    end = responder()
    with pytest.raises(AuthFailed):
        end.receive(initiator(namespace=other).hello)
    assert end.claim is None
    assert "forged" in fails_late(other)


def fails_late(other):
    """An active attacker without the PSK who answers Alice: what she makes of it."""
    one, attacker = initiator(), responder(EVE, other)
    hello = handshake._hello(other.key, PURPOSE, SEALED, one.hello[-48:-16])      # with Alice's ephemeral key in it
    with pytest.raises(AuthFailed) as caught:
        one.receive(attacker.receive(hello))
    return str(caught.value)


@pytest.mark.parametrize(("how", "match"), [
    ({"to_rank": 2}, "which is not here"), ({"epoch": 6}, "which is not here"), ({"group": 1}, "which is not here"),
    ({"meeting": bytes(16)}, "which is not here"), ({"admits": {}}, "is awaited"),
    ({"admits": {(Kind.CONTROL, 3): SEALED, (Kind.DATA, 2): SEALED}}, "kind 2 from rank 3 is awaited"),
    ({"admits": {(Kind.DATA, 3): ciphers.PLAIN}}, "no cipher in common"),
])
def test_a_connection_for_something_else_is_refused(how, match):
    assert match in fails(initiator(), responder(**how))


def test_another_version_is_told_apart_from_another_psk():
    hello = bytearray(initiator().hello)
    struct.pack_into("<H", hello, 4, handshake.VERSION + 1)
    with pytest.raises(AuthFailed, match="version 2 of the handshake, not 1"):
        responder().receive(bytes(hello))
    with pytest.raises(AuthFailed, match="does not speak"):
        responder().receive(b"GET / HTTP/1.1\r\n".ljust(HELLO_BYTES, b" "))


def test_the_expected_node_and_no_other():
    one, other = initiator(expects=BOB.public), responder()
    converse(one, other)
    assert f"the peer is node {EVE.peer_id}, not {BOB.peer_id}" in fails(initiator(expects=BOB.public), responder(EVE))


def test_an_identity_can_not_be_borrowed(monkeypatch):
    # Eve is a member: she has the PSK. She says she is Bob, or Alice, but signs with her own key.
    liar = NodeKey(EVE.seed, BOB.public)
    monkeypatch.setattr(NodeKey, "sign", lambda self, message: SIGN(NodeKey.from_seed(self.seed), message))
    assert "signature in the answer" in fails(initiator(), responder(liar))
    assert "signature in the proof" in fails(initiator(NodeKey(EVE.seed, ALICE.public)), responder())


SIGN = NodeKey.sign


def test_a_relay_between_honest_ends_learns_and_changes_nothing():
    # Eve, a member, meets Alice as "Bob" and Bob as "Alice": each end sees Eve's key, and the bindings differ.
    alice, eve_as_bob = initiator(), responder(EVE)
    eve_as_alice, bob = initiator(EVE), responder()
    converse(alice, eve_as_bob)
    converse(eve_as_alice, bob)
    assert alice.session.peer == bob.session.peer == EVE.public
    assert alice.session.binding != bob.session.binding
    assert fails(initiator(expects=BOB.public), responder(EVE))
    # Without the PSK she can only pass messages on, and then has no key.
    one, other = initiator(), responder()
    wire = b"".join(converse(one, other))
    for secret in (one.session.send_key, one.session.receive_key, one.session.binding, LAB.key, LAB.root,
                   ALICE.public, BOB.public):                           # who they are does not show, either
        assert secret not in wire
    assert fails(initiator(), responder(to_rank=2))                     # nor pass a connection on to another rank


def test_ciphers_are_chosen_under_the_signatures():
    both, old = SEALED, ciphers.CHACHA20_POLY1305
    for mine, theirs, chosen in ((both, both, ciphers.AEGIS_128L), (both, old, old), (old, both, old),
                                 (both | 1, both | 1, ciphers.AEGIS_128L), (ciphers.PLAIN, both | 1, ciphers.PLAIN)):
        one, other = initiator(offers=mine), responder(admits={(Kind.DATA, 3): theirs})
        converse(one, other)
        assert one.session.cipher == other.session.cipher == chosen
    assert (one.session.send_key, one.session.receive_key) == (b"", b"")

    def downgrade(which, message):
        return message[:32] + bytes([old]) + message[33:] if which == 1 else message
    assert "forged" in fails(initiator(), responder(), downgrade)
    assert "forged" in fails(initiator(offers=old), responder(admits={(Kind.DATA, 3): old}),
                             lambda which, message: message[:32] + b"\1" + message[33:] if which == 1 else message)
    assert len(ciphers.NAMES) == 3 and ciphers.choose(255, 255) == ciphers.AEGIS_128L and ciphers.choose(2, 4) == 0


@pytest.mark.parametrize("point", [bytes(32), b"\1" + bytes(31), bytes.fromhex(
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f")])
def test_ephemeral_keys_of_small_order_are_refused(point):
    hello = handshake._hello(LAB.key, PURPOSE, SEALED, point)           # from a member
    with pytest.raises(AuthFailed, match="ephemeral key of the peer is no good"):
        responder().receive(hello)
    one = initiator()
    with pytest.raises(AuthFailed, match="ephemeral key of the peer is no good"):
        one.receive(point + bytes(ANSWER_BYTES - 32))


def test_a_failure_is_for_good():
    end = responder()
    for _ in range(3):
        with pytest.raises(AuthFailed, match="does not speak"):
            end.receive(bytes(HELLO_BYTES))
    assert end.wants == 0
    one, other = initiator(), responder()
    converse(one, other)
    with pytest.raises(AuthFailed):
        one.receive(b"more")
    assert one.session is None


@given(st.lists(st.binary(min_size=1, max_size=400), max_size=6), st.booleans())
@settings(max_examples=300, deadline=None)
def test_noise_is_refused_and_never_answered(pieces, start):
    end = responder() if start else initiator()
    heard = 0
    for piece in pieces:
        piece = piece[:max(1, end.wants)]
        heard += len(piece)
        try:
            assert end.receive(piece) == b""
        except AuthFailed:
            break
    else:
        assert heard < max(HELLO_BYTES, ANSWER_BYTES)
    assert end.session is None


@given(st.integers(0, 3), st.binary(min_size=1, max_size=64), st.integers(0, 200))
@settings(max_examples=300, deadline=None)
def test_any_change_anywhere_is_noticed(number, noise, at):
    def change(which, message):
        changed = (message[:at] + noise + message[at + len(noise):])[:len(message)] if at < len(message) else message
        return changed if which == number else message
    touched = []

    def watch(which, message):
        result = change(which, message)
        touched.append(result != message)
        return result
    assert bool(fails(initiator(), responder(), watch)) == any(touched)
