# C2: one link over several.
from libc.stdint cimport uint64_t

from fleetcore.transports.base cimport Link, Wire


cdef struct Stripes:
    Wire **wires
    int num
    uint64_t sent, received    # bytes of the stream so far: they say whose turn it is


cdef class StripedLink(Link):
    cdef readonly list links
    cdef Stripes stripes
