"""CRC32C against the vectors of RFC 3720 and a byte-by-byte oracle, on every instruction set."""
import numpy as np
import pytest

from fleetcore.kernels import checksum

LENGTHS = (0, 1, 7, 8, 9, 63, 64, 65, 127, 383, 384, 385, 511, 512, 513, 767, 768, 769, 1000, 6143, 6144, 6145, 6529,
           100_003)


def available():
    names = []
    for name in ("table", "sse4.2", "crc", "avx512"):
        try:
            checksum._force_isa(name)
        except ValueError:
            continue
        names.append(name)
    checksum._force_isa()
    return names


@pytest.fixture(params=available())
def isa(request):
    checksum._force_isa(request.param)
    yield request.param
    checksum._force_isa()


def prefixes(data, crc=0):
    """CRC32C of data[:0], data[:1], ..., bit by bit after the definition."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    state = crc ^ 0xFFFFFFFF
    yield crc
    for byte in data:
        state = state >> 8 ^ table[(state ^ byte) & 0xFF]
        yield state ^ 0xFFFFFFFF


READ_10 = bytes.fromhex("01c00000 00000000 00000000 00000000 14000000 00000400 00000014 00000018"
                        "28000000 00000000 02000000 00000000")


@pytest.mark.parametrize("data,expected", [
    (b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E), (bytes(range(31, -1, -1)), 0x113FDB5C), (READ_10, 0xD9963A56),
], ids=["empty", "digits", "zeros", "ones", "up", "down", "iscsi"])
def test_vectors_of_rfc_3720(isa, data, expected):
    assert checksum.checksum(data) == expected


def test_every_length_equals_the_definition(isa):
    data = np.random.default_rng(1).integers(0, 256, 14_000, np.uint8)
    expected = list(prefixes(data.tobytes()))
    for length in [*range(1600), *range(6000, 6700), *range(12_200, 12_400), 14_000]:
        assert checksum.checksum(data[:length]) == expected[length], length


@pytest.mark.parametrize("start", [0, 1, 3, 8, 33])
def test_every_start_and_length_continues_any_crc(isa, start):
    data = np.random.default_rng(2).integers(0, 256, 100_100, np.uint8)[start:]
    for seed in (1, 0x80000000, 0xFFFFFFFF, 0xE3069283):
        expected = list(prefixes(data.tobytes(), seed))
        for length in LENGTHS:
            assert checksum.checksum(data[:length], seed) == expected[length], (seed, length)


def test_pieces_continue_each_other(isa):
    data = np.random.default_rng(3).integers(0, 256, 300_007, np.uint8)
    whole = checksum.checksum(data)
    for cut in (0, 1, 100, 512, 4095, 6144, 150_000, 300_006, 300_007):
        assert checksum.checksum(data[cut:], checksum.checksum(data[:cut])) == whole


def test_any_flipped_bit_is_seen(isa):
    data = np.zeros(1024, np.uint8)
    seen = {checksum.checksum(data)}
    for bit in range(8 * len(data)):
        data[bit >> 3] ^= 1 << (bit & 7)
        seen.add(checksum.checksum(data))
        data[bit >> 3] ^= 1 << (bit & 7)
    assert len(seen) == 8 * len(data) + 1


def test_takes_any_contiguous_buffer():
    values = np.arange(100, dtype=np.float32)
    assert checksum.checksum(values) == checksum.checksum(values.tobytes()) == checksum.checksum(memoryview(values))
    with pytest.raises((BufferError, ValueError)):
        checksum.checksum(values[::2])
    with pytest.raises(OverflowError):
        checksum.checksum(values, 1 << 32)
    with pytest.raises(ValueError):
        checksum._force_isa("altivec")
    assert checksum.isa() == available()[-1]
