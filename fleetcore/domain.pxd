# C2: the ranks of one host, tied by shared memory.
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from fleetcore.arena cimport Arena, Buffer
from fleetcore.posix cimport pollfd
from fleetcore.status cimport Call, Fault

cdef enum:
    TINY_BYTES = 24            # fits the header's own cache line
    INLINE_BYTES = 8128        # small messages ride behind the header; header + this = 8 KiB a slot

cdef enum Place:               # where a rank's data lies
    PLACE_INLINE = 0
    PLACE_ARENA = 1            # address = offset in that rank's arena
    PLACE_PROCESS = 2          # address = virtual address in that rank's process

cdef enum Way:                 # how ordinary memory is reduced
    WAY_STREAM = 0             # through slots, written past the caches
    WAY_STAGE = 1              # through slots in cache
    WAY_READ = 2               # process_vm_readv
    NUM_WAYS = 3

cdef struct Want:              # what this rank takes of one peer's input
    size_t whole               # bytes of that input
    size_t start, stop         # what is wanted of it; nothing when equal
    char *into

cdef struct Slot:              # what one rank says about one operation
    uint64_t sequence          # written last
    Call call
    uint64_t address
    uint32_t place
    uint32_t way               # rank 0's is the one that counts
    uint8_t tiny[24]
    uint8_t small[8128]

cdef struct Line:              # written by one rank, read by all; a cache line per role
    uint32_t bell              # futex
    uint32_t waits_for         # 1 + the rank whose word this one sleeps on; 0: awake
    uint8_t pad0[56]
    uint64_t phase             # how many steps inside operations this rank has finished
    uint8_t pad1[56]
    uint64_t stage             # offset of its staging slots in its arena
    uint8_t pad2[56]
    Slot slots[2]              # operation s uses slots[s & 1]; see Domain.announce

cdef struct Board:
    uint32_t verdict           # 0 none, 1 being written, 2 readable
    uint32_t pad0[15]
    Fault fault

cdef class Domain:
    cdef readonly int rank, size
    cdef readonly str path
    cdef readonly uint64_t sequence, read_bytes
    cdef list arenas
    cdef Buffer board_buffer, stage_buffer
    cdef Board *board
    cdef Line *lines
    cdef Line *me
    cdef char **bases
    cdef size_t *capacities
    cdef pollfd *watched
    cdef int *pids
    cdef char *scratch
    cdef void **srcs
    cdef void **dsts
    cdef uint64_t phase
    cdef int64_t spin_ns
    cdef int[3] allowed
    cdef double[3] cost        # ns per byte of large calls, running mean; 0: not tried
    cdef uint64_t num_large
    cdef int tried
    cdef size_t own_start, own_end, part_start, piece_bytes

    cdef int announce(self, const Call *call, char *data, size_t nbytes, int64_t deadline, Fault *fault) noexcept nogil
    cdef int all_reduce(self, const Call *call, char *data, int64_t deadline, Fault *fault) noexcept nogil
    cdef int broadcast(self, const Call *call, char *data, int64_t deadline, Fault *fault) noexcept nogil
    cdef int barrier(self, const Call *call, int64_t deadline, Fault *fault) noexcept nogil
    cdef int exchange(self, const Call *call, const char *data, size_t nbytes, const Want *wants, size_t longest, int64_t deadline, Fault *fault) noexcept nogil
    cdef int combine(self, const Call *call, const char *data, size_t start, size_t stop, char *into, int64_t deadline, Fault *fault) noexcept nogil
    cdef int reduce(self, const Call *call, char *data, int64_t deadline, Fault *fault) noexcept nogil
    cdef int combine_announced(self, const Call *call, const char *data, size_t start, size_t stop, char *into, int64_t deadline, Fault *fault) noexcept nogil
    cdef void condemn(self, const Fault *fault) noexcept nogil

    cdef int blame(self, Fault *fault, int status, int rank, int error) noexcept nogil
    cdef int verdict(self, Fault *fault) noexcept nogil
    cdef int dead_peer(self, int64_t word_offset, uint64_t target) noexcept nogil
    cdef void publish(self, uint64_t *word, uint64_t value) noexcept nogil
    cdef void ring(self, int peer) noexcept nogil
    cdef int wait_for(self, int peer, int64_t word_offset, uint64_t target, int64_t deadline, Fault *fault) noexcept nogil
    cdef int step(self) noexcept nogil
    cdef int finish(self, int64_t deadline, Fault *fault) noexcept nogil
    cdef Slot *said(self, int peer) noexcept nogil
    cdef bint is_staged(self, int peer) noexcept nogil
    cdef int reduce_range(self, const Call *call, size_t nbytes, char *into, Fault *fault) noexcept nogil
    cdef int wait_phase_of_all(self, uint64_t target, int64_t deadline, Fault *fault) noexcept nogil
    cdef char *stage_in(self, int peer, size_t turn) noexcept nogil
    cdef char *stage_out(self, int peer, size_t turn) noexcept nogil
    cdef int reduce_part(self, const Call *call, char *data, size_t first, size_t last, int way, int64_t deadline, Fault *fault) noexcept nogil
    cdef int choose_way(self, size_t nbytes) noexcept nogil
    cdef int fetch(self, int peer, size_t start, size_t nbytes, char *into, Fault *fault) noexcept nogil
    cdef int reduce_in_place(self, const Call *call, int64_t deadline, Fault *fault) noexcept nogil
    cdef int reduce_by_reading(self, const Call *call, char *data, int64_t deadline, Fault *fault) noexcept nogil
    cdef int reduce_by_staging(self, const Call *call, char *data, bint streaming, int64_t deadline, Fault *fault) noexcept nogil
