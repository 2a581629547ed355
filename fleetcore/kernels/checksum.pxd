# C1: CRC32C (Castagnoli), the checksum of every frame.
from libc.stddef cimport size_t
from libc.stdint cimport uint32_t

cdef uint32_t crc32c(uint32_t crc, const void *data, size_t nbytes) noexcept nogil
# Continues `crc` (0 to start) over nbytes; crc32c(0, "123456789", 9) == 0xE3069283 (RFC 3720 B.4).
