from fleetcore.transports.base cimport Link


cdef class TcpLink(Link):
    pass
