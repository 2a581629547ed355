"""C1: copies for another core to read."""
from libc.stddef cimport size_t

from fleetcore.errors import ShapeError


cdef extern from "fc_copy.h" nogil:
    void fc_copy_out(void *dst, const void *src, size_t nbytes) noexcept


cdef void copy_out(void *dst, const void *src, size_t nbytes) noexcept nogil:
    fc_copy_out(dst, src, nbytes)


def copy_array(unsigned char[::1] dst, const unsigned char[::1] src):
    """dst[:] = src[:] by copy_out.

    Raises:  ShapeError when the sizes differ.
    """
    if dst.shape[0] != src.shape[0]:
        raise ShapeError(f"cannot copy {src.shape[0]} bytes into {dst.shape[0]}")
    if src.shape[0]:
        with nogil:
            fc_copy_out(&dst[0], &src[0], src.shape[0])
