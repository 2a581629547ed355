from libc.stdint cimport uint64_t

from fleetcore.transports.base cimport Link, Wire

cdef enum:
    HEADER_BYTES = 8           # of a record: its length, u32 little-endian, and the same inverted
    MOST_TAG_BYTES = 32
    MOST_RECORDS = 4           # sealed at once: the header of a frame, and what follows it

# As libsodium declares them; `secret` is unused, what is out of an AEAD's range is refused by the constructor.
ctypedef int (*Seal)(unsigned char *out, unsigned long long *out_bytes, const unsigned char *text,
                     unsigned long long size, const unsigned char *known, unsigned long long known_bytes,
                     const unsigned char *secret, const unsigned char *nonce, const unsigned char *key) noexcept nogil
ctypedef int (*Open)(unsigned char *text, unsigned long long *text_bytes, unsigned char *secret,
                     const unsigned char *sealed, unsigned long long sealed_bytes, const unsigned char *known,
                     unsigned long long known_bytes, const unsigned char *nonce,
                     const unsigned char *key) noexcept nogil

cdef struct Channel:
    Wire socket                # the stream below
    Seal seal
    Open open
    size_t record_bytes, tag_bytes
    unsigned char send_key[32]
    unsigned char receive_key[32]
    uint64_t sealed, opened    # records so far: their nonces
    unsigned char *tx          # records [tx_start, tx_stop) are sealed and not taken by the kernel yet
    size_t tx_start, tx_stop, tx_capacity
    int tx_first, tx_num       # of them, records tx_first .. tx_num - 1: where each ends and how much text it holds
    size_t tx_ends[MOST_RECORDS]
    size_t tx_texts[MOST_RECORDS]
    unsigned char *rx          # [rx_start, rx_stop) has arrived
    size_t rx_start, rx_stop, rx_capacity
    unsigned char *text        # [text_start, text_stop): opened, but too long for where the caller wanted it
    size_t text_start, text_stop
    int broken                 # the stream can not be trusted any more


cdef class SecureLink(Link):
    cdef Channel channel
    cdef Link inner
    cdef readonly object cipher
