# C1: copies for another core to read.
from libc.stddef cimport size_t

cdef void copy_out(void *dst, const void *src, size_t nbytes) noexcept nogil
# memcpy that leaves dst in memory rather than in this core's cache, and is complete for other cores once it returns and a
# release store follows. Between cores that share no cache, reading a line that another core has just written costs several
# times as much as reading memory (python -m bench kernels copy). No overlap.
