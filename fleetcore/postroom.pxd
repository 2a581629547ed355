# C3: messages between pairs of ranks: letters, matching and bounded buffering, all without the GIL.
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from fleetcore.posix cimport pollfd
from fleetcore.transports.base cimport Wire
from fleetcore.transports.loopback cimport LoopbackLink

cdef enum:
    ANY_RANK = -1
    NOTE_BYTES = 256               # longest note
    LETTER_BYTES = 56
    OFFER_BYTES = 24
    HEAD_BYTES = 336               # letter + longest note + offer
    ST_WITHDRAWN = -101            # beside status.pxd: the sender gave up half-way
    ST_CANCELLED = -102            # given up on this side
    ST_DECLINED = -103             # `make` raised; the Request knows what

cdef enum LetterKind:
    LETTER_FIRST = 1               # a message with its first chunk
    LETTER_MORE = 2                # a further chunk
    LETTER_OFFER = 3               # a large message without payload, answered by
    LETTER_TAKEN = 4               #   ... "I have read it from your memory", or
    LETTER_SEND = 5                #   ... "there is a place for it now: send MORE"
    LETTER_WITHDRAWN = 6           # the sender gave up on a message that it had begun or offered
    LETTER_BYE = 7                 # the last one

cdef struct Letter:                # before every chunk; little-endian
    uint32_t magic
    uint32_t header_crc            # over the letter with this field 0
    uint32_t epoch
    uint32_t group
    uint16_t kind
    uint16_t note_bytes            # FIRST and OFFER: the note follows the letter
    uint32_t tag
    uint64_t sequence              # of the message, per direction, from 1
    uint64_t total                 # payload bytes of the whole message
    uint64_t start                 # where the chunk begins in it
    uint32_t length                # payload bytes that follow (after the note)
    uint32_t payload_crc           # over note (and Offer) and chunk

cdef struct Offer:                 # after the note of an OFFER
    uint64_t address               # of the payload in the sender's process; 0: it cannot be read
    uint64_t word_at               # where `word` is there as long as the offer stands
    uint64_t word

cdef enum PostState:
    POST_NEW = 0                   # on the stack of a thread that posted it
    POST_WAITING = 1               # a send in its queue, a receive without a message
    POST_HANDED = 2                # a receive whose message is known and wants a place
    POST_MOVING = 3                # bytes are on their way
    POST_OFFERED = 4               # a send whose peer has not answered yet
    POST_OVER = 5

cdef struct Post:                  # a send or a receive that was asked for; lies in its Request
    Post *next                     # in whatever line it stands
    Post *before                   # among all that are not over
    Post *after
    void *owner                    # the Request
    int sending
    int peer                       # a receive's source, once it is known
    int any_source
    uint32_t tag
    int state
    int cancelled                  # set by any thread, with Postroom.attention
    char *data
    size_t nbytes
    size_t sent
    uint64_t sequence
    uint64_t word
    int64_t deadline
    int status, error
    Parcel *parcel                 # of a receive, from HANDED on; of a send to oneself, while it waits
    uint16_t note_bytes
    char note[256]

cdef struct Parcel:                # a message on the receiving side; its note lies behind it
    Parcel *next                   # among the unexpected ones of its peer, in order of arrival
    int peer
    uint32_t tag
    uint64_t sequence, arrival
    size_t total, got
    size_t charged                 # bytes of the peer's bound that it uses
    Post *taker
    Post *source                   # a message to oneself that was not copied
    char *into                     # the taker's memory
    char *room                     # or the own buffer
    int complete, discard
    int asked                      # an OFFER that was answered by SEND
    int stale                      # an OFFER that no longer stands: WITHDRAWN is on its way
    Offer offer
    uint16_t note_bytes

cdef struct Lane:                  # one peer
    Wire *wire                     # NULL at the own place
    int pid                        # of a peer whose memory this rank can read; -1: none
    int near                       # the peer may be able to read this rank's
    int tx_status, rx_status       # OK, or why that direction is over
    int error
    int left                       # it said BYE
    Post *queue                    # sends in order, the first one perhaps half-way
    Post *queue_end
    Post *offer                    # the one send that is offered and unanswered
    int tx_busy                    # a letter is half-way out; it must go, whatever happens to its message
    int tx_full                    # the socket would block
    uint8_t tx_head[336]
    size_t tx_head_bytes, tx_bytes, tx_sent
    char *tx_data
    char *tx_rest                  # own copy of the chunk, when its post was given up
    Post *tx_post
    uint64_t tx_sequence
    uint64_t withdrawn[2]          # sequences still to tell; the half-sent one, the offered one
    uint64_t answer                # sequence of the offer to answer, 0: none
    int answer_kind
    char *ahead                    # what one read brought beyond the current chunk
    size_t ahead_at, ahead_end
    int rx_dry
    int rx_checked                 # `rx` holds the next letter, checked, its note is still to come
    Letter rx
    uint64_t rx_sequence
    Parcel *incoming               # the message whose chunks are coming
    int in_chunk
    size_t chunk_left
    uint32_t crc
    Parcel *offered                # the peer's unanswered offer
    Parcel *first                  # unexpected messages
    Parcel *last
    size_t unread                  # bytes charged for them
    uint64_t served                # when an any-source receive last took from this peer

cdef class Postroom:
    cdef readonly int rank, size
    cdef readonly size_t unread_bytes, near_bytes, far_bytes
    cdef readonly list links
    cdef uint32_t epoch, group
    cdef int64_t spin_ns
    cdef Lane *lanes
    cdef pollfd *fds
    cdef char *scratch
    cdef char *aheads
    cdef uint64_t secret, clock
    cdef int turn
    cdef LoopbackLink bell_rope, bell_house
    cdef void *stack               # posts of any thread, newest first
    cdef uint32_t asleep           # the driver is in poll, or about to be
    cdef uint32_t attention        # some post was cancelled
    cdef volatile int closing
    cdef volatile int wanted       # threads that would rather drive themselves
    cdef Post *all
    cdef Post *posted              # receives without a message, in order
    cdef Post *posted_end
    cdef Post *hands               # receives to be given a place, in order
    cdef Post *hands_end
    cdef Post *finished
    cdef int64_t next_deadline
    cdef readonly uint64_t messages_sent, messages_received, bytes_sent, bytes_received, read_bytes

    cdef void push_post(self, Post *post) noexcept nogil
    cdef bint knock(self) noexcept nogil
    cdef int drive(self, int64_t until, bint yielding) noexcept nogil
    cdef bint step(self) noexcept nogil
    cdef void accept(self) noexcept nogil
    cdef void deliver(self, Post *post) noexcept nogil
    cdef void give_up(self, Post *post, int status, int error) noexcept nogil
    cdef void say_goodbye(self) noexcept nogil
    cdef size_t held_back(self, int peer) noexcept nogil

    cdef void finish(self, Post *post, int status, int error) noexcept nogil
    cdef void sweep(self, int64_t now) noexcept nogil
    cdef void admit(self, Post *post) noexcept nogil
    cdef void keep(self, Post *post) noexcept nogil
    cdef int listen(self, int timeout_ms, int64_t spin_ns) noexcept nogil
    cdef int sleep(self, int64_t most_ns, bint yielding) noexcept nogil
    cdef bint sendable(self, Lane *lane) noexcept nogil

    cdef bint push(self, Lane *lane) noexcept nogil
    cdef Letter *write_letter(self, Lane *lane, int kind, uint64_t sequence) noexcept nogil
    cdef bint needs_offer(self, Lane *lane, Post *post) noexcept nogil
    cdef bint next_letter(self, Lane *lane) noexcept nogil
    cdef void letter_out(self, Lane *lane) noexcept nogil
    cdef void stop_sending(self, Lane *lane, int status, int error) noexcept nogil

    cdef bint pull(self, Lane *lane) noexcept nogil
    cdef int check_letter(self, Lane *lane) noexcept nogil
    cdef int open(self, Lane *lane, const char *note) noexcept nogil
    cdef int open_message(self, Lane *lane, const char *note) noexcept nogil
    cdef char *place(self, Lane *lane, Parcel *parcel) noexcept nogil
    cdef bint fetch(self, Lane *lane) noexcept nogil
    cdef void answer(self, Lane *lane, Parcel *parcel, int kind) noexcept nogil
    cdef void complete(self, Lane *lane, Parcel *parcel) noexcept nogil
    cdef void stop_receiving(self, Lane *lane, int status, int error) noexcept nogil
    cdef void bury(self, Lane *lane, Parcel *parcel, int status, int error) noexcept nogil

    cdef Post *expected(self, int peer, uint32_t tag) noexcept nogil
    cdef Parcel *unexpected(self, Post *post) noexcept nogil
    cdef void match(self, Parcel *parcel, Post *post) noexcept nogil
    cdef void repost(self, Post *post) noexcept nogil
    cdef void enlist(self, Lane *lane, Parcel *parcel) noexcept nogil
    cdef void strike(self, Lane *lane, Parcel *parcel) noexcept nogil
    cdef void uncharge(self, Parcel *parcel) noexcept nogil
    cdef void drop(self, Lane *lane, Parcel *parcel) noexcept nogil
    cdef bint anyone_left(self) noexcept nogil
