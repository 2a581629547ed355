"""C2: a link over any other stream link, its bytes sealed in records (authenticated encryption).

A record is an 8-byte header (length, and the length inverted), the sealed text and the tag. The header is authenticated
with the text; it says its length twice so that damage is noticed at once, not after as many bytes as it claims. Nonces
are never sent: both ends count records, so that one left out, repeated or moved fails like a forged one. 2^64 of them
never come to an end.
"""
from typing import NamedTuple

from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from fleetcore.posix cimport EINVAL, iovec, memcpy, memmove, memset, posix_memalign, free
from fleetcore.status cimport ST_CORRUPT, ST_SYSTEM
from fleetcore.transports.base cimport Link, Wire

from fleetcore.errors import ConfigError

# Least of a sweep, 100 MB all-reduced over loopback, one record per call: 16 KiB 85 ms, 64 KiB 51, 128 KiB 39, 256 KiB 37.
RECORD_BYTES = 256 * 1024
cdef size_t LEAST_RECORD, MOST_RECORD
LEAST_RECORD, MOST_RECORD = 64, 1024 * 1024
cdef size_t SLACK_BYTES = 256      # beside full records, room for the header of a frame, so that all goes at once


class Cipher(NamedTuple):
    """An AEAD: addresses of C functions with libsodium's combined-mode signatures (crypto_aead_*_encrypt, _decrypt)."""

    name: str
    seal: int
    open: int
    key_bytes: int
    nonce_bytes: int
    tag_bytes: int


cdef inline void put_nonce(unsigned char *nonce, uint64_t number) noexcept nogil:
    memset(nonce, 0, 32)
    memcpy(nonce, &number, sizeof(number))


cdef void seal_some(Channel *c, iovec *parts, int num_parts, size_t skip) noexcept nogil:
    """Seal what the buffer holds of the parts, from byte `skip` of them on; the buffer is empty before."""
    cdef unsigned char nonce[32]
    cdef uint32_t header[2]
    cdef size_t at = 0, start, size, room
    cdef int i
    c.tx_first = c.tx_num = 0
    for i in range(num_parts):
        start = skip if skip < parts[i].iov_len else parts[i].iov_len
        skip -= start
        while start < parts[i].iov_len and c.tx_num < MOST_RECORDS:
            room = c.tx_capacity - at
            if room <= HEADER_BYTES + c.tag_bytes:
                break
            size = parts[i].iov_len - start
            if size > c.record_bytes:
                size = c.record_bytes
            if HEADER_BYTES + size + c.tag_bytes > room:
                if at:                             # whole records of the largest size are the cheapest ones
                    break
                size = room - HEADER_BYTES - c.tag_bytes
            header[0], header[1] = <uint32_t>size, ~<uint32_t>size
            memcpy(c.tx + at, header, HEADER_BYTES)
            put_nonce(nonce, c.sealed)
            c.seal(c.tx + at + HEADER_BYTES, NULL, <const unsigned char *>parts[i].iov_base + start, size,
                   c.tx + at, HEADER_BYTES, NULL, nonce, c.send_key)
            c.sealed += 1
            at += HEADER_BYTES + size + c.tag_bytes
            start += size
            c.tx_ends[c.tx_num], c.tx_texts[c.tx_num] = at, size
            c.tx_num += 1
        if start < parts[i].iov_len:
            break
    c.tx_start, c.tx_stop = 0, at


cdef Py_ssize_t secure_send(Wire *wire, iovec *parts, int num_parts) noexcept nogil:
    """Text counts as taken once the whole record it is in has been."""
    cdef Channel *c = <Channel *>wire.state
    cdef size_t offered = 0, taken = 0
    cdef iovec part
    cdef Py_ssize_t n
    cdef int i
    for i in range(num_parts):
        offered += parts[i].iov_len
    while True:
        if c.tx_start < c.tx_stop:
            part.iov_base, part.iov_len = c.tx + c.tx_start, c.tx_stop - c.tx_start
            n = c.socket.send_some(&c.socket, &part, 1)
            wire.sent_bytes, wire.sends, wire.error = c.socket.sent_bytes, c.socket.sends, c.socket.error
            if n <= 0:
                return <Py_ssize_t>taken if taken else n
            c.tx_start += n
            while c.tx_first < c.tx_num and c.tx_ends[c.tx_first] <= c.tx_start:
                taken += c.tx_texts[c.tx_first]
                c.tx_first += 1
            if taken > offered:                    # less was offered again than had been before
                wire.error = EINVAL
                return ST_SYSTEM
            if <size_t>n < part.iov_len:
                return <Py_ssize_t>taken
        if taken == offered:
            return <Py_ssize_t>taken
        seal_some(c, parts, num_parts, taken)


cdef Py_ssize_t whole_record(Channel *c) noexcept nogil:
    """Text bytes of the record that has arrived whole; 0: more has to come; ST_CORRUPT: its header makes no sense."""
    cdef uint32_t header[2]
    cdef size_t have = c.rx_stop - c.rx_start
    if have < HEADER_BYTES:
        return 0
    memcpy(header, c.rx + c.rx_start, HEADER_BYTES)
    if header[0] != ~header[1] or header[0] == 0 or header[0] > c.record_bytes:
        return ST_CORRUPT
    return header[0] if have >= HEADER_BYTES + header[0] + c.tag_bytes else 0


cdef Py_ssize_t fill(Channel *c, Wire *wire, bint *dry) noexcept nogil:
    """Take what has arrived below, as far as there is room; there is, for whole records have been opened."""
    cdef iovec part
    cdef Py_ssize_t n
    cdef size_t have = c.rx_stop - c.rx_start
    if have == 0:
        c.rx_start = c.rx_stop = 0
    elif c.rx_start + HEADER_BYTES + c.record_bytes + c.tag_bytes > c.rx_capacity:
        memmove(c.rx, c.rx + c.rx_start, have)
        c.rx_start, c.rx_stop = 0, have
    part.iov_base, part.iov_len = c.rx + c.rx_stop, c.rx_capacity - c.rx_stop
    n = c.socket.recv_some(&c.socket, &part, 1)
    wire.received_bytes, wire.receives, wire.error = c.socket.received_bytes, c.socket.receives, c.socket.error
    if n > 0:
        c.rx_stop += n
        dry[0] = <size_t>n < part.iov_len
    return n


cdef Py_ssize_t secure_recv(Wire *wire, iovec *parts, int num_parts) noexcept nogil:
    """Never leaves a whole record unopened while there is room: a poll of the descriptor would not tell of it."""
    cdef Channel *c = <Channel *>wire.state
    cdef unsigned char nonce[32]
    cdef unsigned char *into
    cdef unsigned char *record
    cdef size_t got = 0, at = 0, room, size
    cdef Py_ssize_t n
    cdef bint dry = False
    cdef int i = 0
    if c.broken:
        return ST_CORRUPT
    while i < num_parts:
        room = parts[i].iov_len - at
        if room == 0:
            i, at = i + 1, 0
            continue
        into = <unsigned char *>parts[i].iov_base + at
        if c.text_start < c.text_stop:
            size = c.text_stop - c.text_start
            if size > room:
                size = room
            memcpy(into, c.text + c.text_start, size)
            c.text_start += size
        else:
            n = whole_record(c)
            if n == 0:
                if dry:
                    break
                n = fill(c, wire, &dry)
                if n <= 0:
                    return <Py_ssize_t>got if got else n
                continue
            size = n if n > 0 else 0
            if n > 0:
                record = c.rx + c.rx_start
                put_nonce(nonce, c.opened)
                n = c.open(into if size <= room else c.text, NULL, NULL, record + HEADER_BYTES, size + c.tag_bytes,
                           record, HEADER_BYTES, nonce, c.receive_key)
            if n != 0:                             # at once, also after good bytes: no poll would come back for it
                c.broken, wire.error = 1, 0
                return ST_CORRUPT
            c.opened += 1
            c.rx_start += HEADER_BYTES + size + c.tag_bytes
            if size > room:
                c.text_start, c.text_stop = 0, size
                continue
        got += size
        at += size
    return <Py_ssize_t>got


cdef class SecureLink(Link):
    """Takes over a connected link and seals what goes through it; the other end does the same with the keys swapped.

    What `stats` counts includes headers and tags. A record that was damaged, forged, repeated or left out, or whose
    length makes no sense, is ST_CORRUPT, and so is everything after it. record_bytes bounds the memory, whatever comes.

    Args:    inner: a Link over a stream; it is left empty, its descriptor belongs to this link from here on.
             cipher: a Cipher; its functions must stay where they are as long as the link lives.
             send_key, receive_key: cipher.key_bytes each, fresh for this connection and different from each other.
             record_bytes: most text of a record; both ends must agree.
    Raises:  ConfigError for keys or a cipher of a wrong size; MemoryError.
    """

    def __init__(self, Link inner, cipher, bytes send_key, bytes receive_key, *, size_t record_bytes=RECORD_BYTES):
        cdef Channel *c = &self.channel
        cdef size_t whole = HEADER_BYTES + record_bytes + cipher.tag_bytes
        if not (len(send_key) == len(receive_key) == cipher.key_bytes <= 32 and cipher.nonce_bytes <= 32
                and 8 <= cipher.nonce_bytes and cipher.tag_bytes <= MOST_TAG_BYTES):
            raise ConfigError(f"{cipher.name} takes keys of {cipher.key_bytes} bytes, at most 32")
        if send_key == receive_key:
            raise ConfigError("the keys of both directions must differ: their nonces are the same")
        if not LEAST_RECORD <= record_bytes <= MOST_RECORD:
            raise ConfigError(f"record_bytes must be from {LEAST_RECORD} to {MOST_RECORD}, not {record_bytes}")
        if c.tx != NULL:
            raise ConfigError("this link is set up already")
        c.record_bytes, c.tag_bytes = record_bytes, cipher.tag_bytes
        c.tx_capacity = c.rx_capacity = 2 * whole + SLACK_BYTES     # two records: a chunk of the executor in one call
        if (posix_memalign(<void **>&c.tx, 4096, c.tx_capacity) or posix_memalign(<void **>&c.rx, 4096, c.rx_capacity)
                or posix_memalign(<void **>&c.text, 4096, record_bytes)):
            raise MemoryError()
        c.seal, c.open = <Seal><uintptr_t>cipher.seal, <Open><uintptr_t>cipher.open
        memcpy(c.send_key, <const char *>send_key, len(send_key))
        memcpy(c.receive_key, <const char *>receive_key, len(receive_key))
        self.inner, self.cipher = inner, cipher
        c.socket = inner.wire
        inner.wire.fd = -1
        self.wire = c.socket
        self.wire.state, self.wire.authentic, self.wire.patient = c, True, False
        self.wire.send_some, self.wire.recv_some = secure_send, secure_recv

    def stats(self):
        """As Link.stats, and "cipher": its name."""
        return super().stats() | {"cipher": self.cipher.name}

    def __dealloc__(self):
        memset(&self.channel.send_key, 0, 32)
        memset(&self.channel.receive_key, 0, 32)
        free(self.channel.tx)
        free(self.channel.rx)
        free(self.channel.text)
