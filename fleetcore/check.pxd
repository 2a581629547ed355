# C1: the one place where a negative Status becomes an exception, and where waits ask Python for pending signals.
from fleetcore.status cimport Call, Fault

cdef int interrupted() noexcept nogil
# Run pending Python signal handlers (takes the GIL for it). Non-zero: one of them raised, and the exception is set.

cdef int check(int rc, const Fault *fault, object context) except -1
# Return rc when it is >= 0, else raise what fault says. context: a fleetcore.check.Context.

cdef int adopt(Fault *mine, const Fault *reported, int rank) noexcept nogil
# Make another rank's fault this rank's own, keeping mine.mine and mine.done_bytes; returns its status.
