# C3: runs a schedule over links.
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from fleetcore.posix cimport pollfd
from fleetcore.status cimport Call, Fault
from fleetcore.transports.base cimport Wire

cdef enum:
    KIND_SEND = 0
    KIND_COPY = 1
    KIND_FOLD = 2
    FRAME_BYTES = 64

cdef struct Step:              # a Row, compiled; offsets in bytes
    int kind, peer, after, fold
    int next                   # the next step of the same direction with the same peer; -1 at the end
    size_t start, stop
    size_t done                # [start, done) is finished

cdef struct Fold:              # FOLD steps that are reduced together
    int first, num             # their indices are members[first : first + num], in rank order
    int final
    size_t start, stop, done

cdef struct Frame:             # before every chunk
    uint32_t magic
    uint32_t header_crc        # over the header with this field 0
    uint32_t epoch
    uint32_t group
    uint64_t sequence
    Call call
    uint64_t start             # bytes from the beginning of the row
    uint32_t length
    uint32_t payload_crc
    uint64_t unused

cdef struct Notice:            # on the control connection
    uint32_t magic
    uint32_t kind
    uint32_t epoch
    uint32_t crc               # with this field 0
    uint64_t sequence
    Fault fault

cdef struct Lane:              # one peer during one run
    Wire *wire
    Wire *control              # carries notices only, so that a full send queue never delays one
    int left                   # the peer said good-bye, after operation `last`
    uint64_t last
    int tx, rx                 # current step of each direction, -1: none left
    int tx_full, rx_dry        # the socket would block
    size_t tx_at, tx_sent      # chunk start; bytes of header + chunk that are out
    size_t tx_length
    int64_t tx_began, rx_began # when the chunk in hand began to move; only while chunks are recorded
    Frame tx_frame
    int least                  # SO_RCVLOWAT of the socket; 0: as it came
    size_t rx_at, rx_start, rx_length, rx_got          # chunk start, row start; bytes of header + chunk that are in
    int rx_first               # no frame of this operation seen yet
    int rx_checked             # the current frame's header has been checked
    Frame rx_frame, rx_ahead
    size_t rx_ahead_got
    char *rooms                # two chunks of FOLD payload
    int held, oldest           # `held` chunks wait in rooms, the oldest first
    int rx_room                # where the chunk in hand goes; -1: not chosen yet
    Notice notice
    size_t notice_got
    uint64_t said              # the newest operation that the peer has named the call of
    Call said_call

cdef struct Event:             # a chunk that has gone out, come in, or been reduced
    int64_t began, ended       # ns, as now_ns()
    int kind, peer             # KIND_SEND, KIND_COPY (received) or KIND_FOLD (peer: -1)
    size_t start, stop         # bytes of the array
    uint64_t sequence

cdef class Program:
    cdef Step *steps
    cdef Fold *folds
    cdef int *members
    cdef int *fold_rank        # position of the own data among the members, per fold
    cdef int num_steps, num_folds, num_members, size
    cdef int *first_tx
    cdef int *first_rx
    cdef readonly size_t itemsize
    cdef readonly size_t writes_start, writes_stop     # the bytes of the array that a run may change
    cdef readonly str algorithm
    cdef list segments         # two_level all_reduce: where each local rank's segment begins, and this rank's, in elements
    cdef size_t own_start, own_stop
    cdef int local_root        # two_level broadcast: who has the array on this host, as a rank of its domain

cdef class Executor:
    cdef readonly int rank, size
    cdef readonly size_t chunk_bytes
    cdef Lane *lanes
    cdef pollfd *fds
    cdef void **srcs
    cdef char *rooms
    cdef uint32_t epoch, group
    cdef int64_t spin_ns, spinning         # the latter: in the operation in hand
    cdef readonly list links, controls
    cdef bint condemned        # all peers know that this group is over
    cdef Fault verdict         # on an operation later than the one in hand; status OK: none
    cdef Event *events         # the newest max_events chunks; NULL: not recorded
    cdef size_t max_events, num_events
    cdef uint64_t sequence     # of the operation in hand, and whether all peers know what call it is
    cdef bint told
    cdef volatile int aborted  # set by another thread to end a run within a nap

    cdef int run(self, Program program, const Call *call, const char *source, char *target, uint64_t sequence, int64_t deadline, Fault *fault) noexcept nogil
    cdef void condemn(self, const Fault *fault) noexcept nogil
    cdef void leave(self, uint64_t sequence) noexcept nogil
    cdef int poll_controls(self, uint64_t sequence, Fault *fault) noexcept nogil

    cdef void note(self, int kind, int peer, int64_t began, size_t start, size_t stop) noexcept nogil
    cdef int blame(self, Fault *fault, int status, int rank, int error) noexcept nogil
    cdef int notify(self, int peer, int kind, uint64_t sequence, const Fault *fault) noexcept nogil
    cdef int read_notice(self, Lane *lane, uint64_t sequence, Fault *fault) noexcept nogil
    cdef bint disagrees(self, const Lane *lane, const Call *call, uint64_t sequence) noexcept nogil
    cdef int push(self, Program program, Lane *lane, const Call *call, const char *source, const char *target, uint64_t sequence, Fault *fault) noexcept nogil
    cdef int pull(self, Program program, Lane *lane, const Call *call, const char *source, char *target, uint64_t sequence, Fault *fault) noexcept nogil
    cdef int check_frame(self, Lane *lane, const Call *call, uint64_t sequence, Fault *fault) noexcept nogil
    cdef int fold(self, Program program, int number, const Call *call, const char *source, char *target, Fault *fault) noexcept nogil
    cdef int awaited(self, Program program) noexcept nogil
    cdef void wake_at(self, const Step *step, Lane *lane) noexcept nogil
    cdef size_t chunk_end(self, const Step *step, size_t at) noexcept nogil
    cdef bint may_push(self, Program program, Lane *lane) noexcept nogil
    cdef bint may_pull(self, Program program, Lane *lane) noexcept nogil
    cdef int sleep(self, Program program, uint64_t sequence, int64_t most_ns, Fault *fault) noexcept nogil
