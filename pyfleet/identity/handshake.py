"""P1: two nodes prove to each other, over a stream that nobody guards, who they are and what the connection is for.

Sans-I/O: bytes come in, bytes go out. Four messages of fixed sizes: nothing is ever allocated on a stranger's word.

    hello    ->   claim: version, ciphers, purpose, epoch, group, ranks, meeting; ephemeral key; a MAC under the PSK
    answer   <-   ephemeral key, the chosen cipher; sealed: the responder's identity and signature
    proof    ->   sealed: the initiator's identity and signature
    welcome  <-   sealed: one byte

It is a SIGMA-I exchange (Krawczyk 2003) with a PSK, in the manner of Noise XXpsk0: every message goes into a transcript
hash, every key is derived from the PSK, the X25519 secret and the transcript so far, every signature covers the
transcript and the role of its signer. So nobody without the PSK gets past the first message, a relay between two honest
ends learns and changes nothing, recorded messages fit no other connection, and a message sent back to its sender does
not either. What was exchanged stays secret when the PSK or the identity keys leak later.
"""
from __future__ import annotations

import enum
import hashlib
import hmac
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from nacl import bindings, exceptions

from pyfleet.errors import AuthFailed
from pyfleet.identity import ciphers
from pyfleet.identity.keys import NodeKey, peer_id
from pyfleet.identity.namespace import Namespace, derive

VERSION = 1
MAGIC = b"FLH2"                     # FLH1 was the token greeting without keys
MEETING_BYTES = 16
_CLAIM = struct.Struct("<4sHBBQIii16s")         # magic, version, ciphers, kind, epoch, group, from, to, meeting
_MAC_BYTES, _TAG_BYTES = 16, 16
_KEY_BYTES, _SIGNATURE_BYTES = 32, 64
HELLO_BYTES = _CLAIM.size + _KEY_BYTES + _MAC_BYTES
PROOF_BYTES = _KEY_BYTES + _SIGNATURE_BYTES + _TAG_BYTES
ANSWER_BYTES = _KEY_BYTES + 1 + PROOF_BYTES
WELCOME_BYTES = 1 + _TAG_BYTES
_NO_NONCE = bytes(12)                           # every key of a handshake seals one message only
_INITIATOR, _RESPONDER = b"initiator", b"responder"
_SIGNED = b"pyfleet handshake signature\0"


class Kind(enum.IntEnum):
    """What a connection carries."""

    CONTROL = 1         # notices of failure between ranks
    DATA = 2            # frames of collectives
    MESSAGE = 3         # messages between ranks
    MEMBER = 4          # membership between nodes
    STRIPE_1 = 5        # more connections for DATA
    STRIPE_2 = 6
    STRIPE_3 = 7
    PROBE = 8           # measuring latency and bandwidth between nodes
    QUERY = 9           # a question to a node, from one that need not stay


@dataclass(frozen=True)
class Purpose:
    """What a connection is for; both ends must mean the same.

    Attributes:
        kind:      a Kind.
        from_rank, to_rank: of the initiator and the responder; -1 between nodes that are no ranks yet.
        epoch, group: the view and the group it belongs to.
        meeting:   16 bytes that the ends agreed on before (a run, a view), so that connections of two runs never mix.
    """

    kind: int
    from_rank: int = -1
    to_rank: int = -1
    epoch: int = 0
    group: int = 0
    meeting: bytes = bytes(MEETING_BYTES)


@dataclass(frozen=True)
class Session:
    """What a finished handshake leaves.

    Attributes:
        peer:        the other node's public key; peer_id is its name.
        cipher:      ciphers.PLAIN, CHACHA20_POLY1305 or AEGIS_128L.
        send_key, receive_key: for the records of this connection; empty when it is plain.
        binding:     32 bytes equal at both ends and nowhere else, to tie something else to this connection.
    """

    peer: bytes
    purpose: Purpose
    cipher: int
    send_key: bytes = field(repr=False)
    receive_key: bytes = field(repr=False)
    binding: bytes = field(repr=False)

    @property
    def peer_id(self) -> str:
        """The other node's full peer id."""
        return peer_id(self.peer)


class _Party:
    """What both roles share: the transcript, the keys, and messages of known sizes out of pieces of any size."""

    ROLE = b""

    def __init__(self, key: NodeKey, namespace: Namespace, awaits: int):
        self.session: Session | None = None
        self._key, self._secret = key, namespace.key
        self._ephemeral = secrets.token_bytes(_KEY_BYTES)
        self._transcript = hashlib.sha3_256(b"pyfleet handshake")
        self._chain = self._secret
        self._pending, self._awaits = b"", awaits
        self._failure: str | None = None

    @property
    def wants(self) -> int:
        """Bytes to read next, at most: what follows the handshake belongs to somebody else. 0: none."""
        return self._awaits - len(self._pending) if self._failure is None else 0

    def receive(self, data: bytes) -> bytes:
        """Take what has arrived, at most `wants` bytes; return what is to be sent, b"" for nothing.

        Raises:  AuthFailed with a reason for the own log; the peer is to be told nothing. So does every later call.
        """
        try:
            if self._failure is not None:
                raise AuthFailed(self._failure)
            if len(data) > self.wants:
                raise AuthFailed("the peer said more than it was asked")
            self._pending += data
            if self.wants or not data:
                return b""
            message, self._pending = self._pending, b""
            return self._take(message)
        except AuthFailed as failure:
            self._failure, self.session = str(failure), None
            raise

    def _take(self, message: bytes) -> bytes:
        """Check a whole message and answer it; _awaits is then the size of the next one."""
        raise AuthFailed("the handshake is over")

    def _hash(self, message: bytes) -> None:
        self._transcript.update(len(message).to_bytes(4, "little") + message)

    def _mix(self, theirs: bytes) -> None:
        """Put the secret that the ephemeral keys share into all later keys."""
        try:
            shared = bindings.crypto_scalarmult(self._ephemeral, theirs)
        except exceptions.CryptoError:                  # a point of small order
            raise AuthFailed("the ephemeral key of the peer is no good") from None
        self._chain = derive(self._chain, "ephemeral", shared)

    def _seal(self, text: bytes, label: str) -> bytes:
        known = self._transcript.digest()
        key = derive(self._chain, label, known)
        sealed = bindings.crypto_aead_chacha20poly1305_ietf_encrypt(text, known, _NO_NONCE, key)
        self._hash(sealed)
        return sealed

    def _open(self, sealed: bytes, label: str) -> bytes:
        known = self._transcript.digest()
        key = derive(self._chain, label, known)
        try:
            text = bindings.crypto_aead_chacha20poly1305_ietf_decrypt(sealed, known, _NO_NONCE, key)
        except exceptions.CryptoError:
            raise AuthFailed(f"the {label} of the peer is forged, or was changed on its way") from None
        self._hash(sealed)
        return text

    def _prove(self, label: str) -> bytes:
        """The sealed message that shows who this end is: its public key, and a signature over all that was said."""
        said = _SIGNED + self.ROLE + self._transcript.digest() + self._key.public
        return self._seal(self._key.public + self._key.sign(said), label)

    def _verify(self, sealed: bytes, label: str, role: bytes) -> bytes:
        """The public key that the peer has proved to hold."""
        said = _SIGNED + role + self._transcript.digest()
        text = self._open(sealed, label)
        public, signature = text[:_KEY_BYTES], text[_KEY_BYTES:]
        try:
            bindings.crypto_sign_open(signature + said + public, public)
        except exceptions.CryptoError:
            raise AuthFailed(f"the signature in the {label} of the peer is not its own") from None
        return public

    def _settle(self, peer: bytes, purpose: Purpose, cipher: int) -> Session:
        """The session, once both ends have proved who they are."""
        known = self._transcript.digest()
        size = 0 if cipher == ciphers.PLAIN else ciphers.cipher(cipher).key_bytes
        theirs = _RESPONDER if self.ROLE == _INITIATOR else _INITIATOR
        mine, theirs = (derive(self._chain, "records", role, known, size=size) for role in (self.ROLE, theirs))
        return Session(peer, purpose, cipher, mine, theirs, derive(self._chain, "binding", known))


class Initiator(_Party):
    """The end that connected. Send `hello`, then whatever `receive` returns, until `session` is there.

    Args:    offers: ciphers to choose from, a sum; PLAIN only where records may travel in the clear.
             expects: the public key the responder must have; None takes any node of the namespace.
    """

    ROLE = _INITIATOR

    def __init__(self, key: NodeKey, namespace: Namespace, purpose: Purpose, offers: int, expects: bytes | None = None):
        super().__init__(key, namespace, ANSWER_BYTES)
        self._purpose, self._offers, self._expects = purpose, offers, expects
        self._next = None
        self.hello = _hello(self._secret, purpose, offers, bindings.crypto_scalarmult_base(self._ephemeral))
        self._hash(self.hello)

    @property
    def peer(self) -> bytes | None:
        """The public key that the responder has proved to hold, known before the own proof is sent; None until then."""
        return self._next.peer if self._next is not None else None

    def _take(self, message: bytes) -> bytes:
        if self._next is not None:
            if self._awaits != WELCOME_BYTES:
                return super()._take(message)
            self._open(message, "welcome")
            self._awaits, self.session = 0, self._next
            return b""
        ephemeral, chosen, proof = message[:_KEY_BYTES], message[_KEY_BYTES], message[_KEY_BYTES + 1:]
        self._mix(ephemeral)
        self._hash(message[:_KEY_BYTES + 1])
        public = self._verify(proof, "answer", _RESPONDER)
        if chosen not in ciphers.NAMES or not chosen & self._offers:
            raise AuthFailed("the peer chose a cipher that was not offered")
        if self._expects not in (None, public):
            raise AuthFailed(f"the peer is node {peer_id(public)}, not {peer_id(self._expects)}")
        answer = self._prove("proof")
        self._next, self._awaits = self._settle(public, self._purpose, chosen), WELCOME_BYTES
        return answer


class Responder(_Party):
    """The end that was connected to. Send what `receive` returns; once `session` is there, the peer has proved itself:
    either send `welcome()` and go on, or hang up.

    Args:    admits: {(kind, from_rank): the sum of ciphers for it}: what connections may come. The owner may change it.
             to_rank, epoch, group, meeting: what the claim of the initiator must say, as in Purpose.
    """

    ROLE = _RESPONDER

    def __init__(self, key: NodeKey, namespace: Namespace, admits: Mapping[tuple[int, int], int], *, to_rank: int = -1,
                 epoch: int = 0, group: int = 0, meeting: bytes = bytes(MEETING_BYTES)):
        super().__init__(key, namespace, HELLO_BYTES)
        self._admits, self._place = admits, (epoch, group, to_rank, meeting)
        self._purpose, self._chosen = None, 0

    @property
    def claim(self) -> Purpose | None:
        """What the initiator, who holds the PSK or has recorded one who does, says the connection is for."""
        return self._purpose

    def _take(self, message: bytes) -> bytes:
        if self._purpose is None:
            return self._answer(message)
        if self._awaits != PROOF_BYTES:
            return super()._take(message)
        public = self._verify(message, "proof", _INITIATOR)
        self._awaits, self.session = 0, self._settle(public, self._purpose, self._chosen)
        return b""

    def _answer(self, hello: bytes) -> bytes:
        self._purpose, offers = _read_hello(self._secret, hello)
        purpose = self._purpose
        if (purpose.epoch, purpose.group, purpose.to_rank, purpose.meeting) != self._place:
            raise AuthFailed(f"the peer wants rank {purpose.to_rank} of epoch {purpose.epoch}, group {purpose.group}, "
                             f"meeting {purpose.meeting.hex()[:8]}, which is not here")
        mine = self._admits.get((purpose.kind, purpose.from_rank), 0)
        if not mine:
            raise AuthFailed(f"no connection of kind {purpose.kind} from rank {purpose.from_rank} is awaited")
        self._chosen = ciphers.choose(mine, offers)
        if not self._chosen:
            raise AuthFailed("no cipher in common: one end is set to encryption off, the other is not")
        self._hash(hello)
        clear = bindings.crypto_scalarmult_base(self._ephemeral) + bytes([self._chosen])
        self._mix(hello[_CLAIM.size:_CLAIM.size + _KEY_BYTES])
        self._hash(clear)
        self._awaits = PROOF_BYTES
        return clear + self._prove("answer")

    def welcome(self) -> bytes:
        """The last message: from here on the connection stands."""
        assert self.session is not None, "the peer has not proved itself"
        return self._seal(b"+", "welcome")


def _hello(secret: bytes, purpose: Purpose, offers: int, ephemeral: bytes) -> bytes:
    claim = _CLAIM.pack(MAGIC, VERSION, offers, purpose.kind, purpose.epoch, purpose.group, purpose.from_rank,
                        purpose.to_rank, purpose.meeting) + ephemeral
    return claim + derive(secret, "hello", claim, size=_MAC_BYTES)


def _read_hello(secret: bytes, hello: bytes) -> tuple[Purpose, int]:
    """What a hello says, once its MAC has shown that a member said it: one hash is all that a stranger costs."""
    magic, version, offers, kind, epoch, group, from_rank, to_rank, meeting = _CLAIM.unpack_from(hello)
    if magic != MAGIC:
        raise AuthFailed("the peer does not speak pyfleet's handshake")
    if version != VERSION:
        raise AuthFailed(f"the peer speaks version {version} of the handshake, not {VERSION}")
    if not hmac.compare_digest(derive(secret, "hello", hello[:-_MAC_BYTES], size=_MAC_BYTES), hello[-_MAC_BYTES:]):
        raise AuthFailed("the peer has another PSK or namespace, or none")
    return Purpose(kind, from_rank, to_rank, epoch, group, meeting), offers
