"""fleetcore: bytes between ranks. Shared memory, sockets, per-element kernels; no policy, no torch, no numpy.

Floors, imports point down only: errors, status, posix < check, arena, kernels < transports, schedules, domain
< executor < group.
"""
