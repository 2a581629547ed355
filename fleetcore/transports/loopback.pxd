from fleetcore.transports.base cimport Link


cdef class LoopbackLink(Link):
    pass
