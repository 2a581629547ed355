"""P1: the ciphers that records between hosts may be sealed with, as libsodium in PyNaCl has them."""
from __future__ import annotations

import nacl.bindings  # noqa: F401 initialises libsodium: only then does it use what the processor offers
from fleetcore.transports.secure import Cipher
from nacl._sodium import ffi, lib

# One bit each: what a peer offers is a sum of them. PLAIN: no cipher, CRC32C only.
PLAIN, CHACHA20_POLY1305, AEGIS_128L = 1, 2, 4
NAMES = {PLAIN: "plain", CHACHA20_POLY1305: "chacha20poly1305", AEGIS_128L: "aegis128l"}
_FUNCTIONS = {CHACHA20_POLY1305: "crypto_aead_chacha20poly1305_ietf", AEGIS_128L: "crypto_aead_aegis128l"}


def offered() -> int:
    """The ciphers worth their while here: AEGIS needs AES instructions to be fast (12 times ChaCha20, then)."""
    return CHACHA20_POLY1305 | (AEGIS_128L if _has_aes() and hasattr(lib, "crypto_aead_aegis128l_encrypt") else 0)


def _has_aes() -> bool:
    # libsodium offers AES-GCM exactly where the processor has AES instructions.
    return bool(lib.crypto_aead_aes256gcm_is_available())


def choose(mine: int, theirs: int) -> int:
    """The best cipher that both offer, the same seen from either side; 0: none."""
    common = mine & theirs & sum(NAMES)
    return 1 << common.bit_length() >> 1


def cipher(chosen: int) -> Cipher:
    """The functions of AEGIS_128L or CHACHA20_POLY1305, to be called from code without the GIL."""
    name = _FUNCTIONS[chosen]
    seal, open_ = (int(ffi.cast("uintptr_t", ffi.addressof(lib, f"{name}_{verb}"))) for verb in ("encrypt", "decrypt"))
    sizes = [int(getattr(lib, f"{name}_{what}")()) for what in ("keybytes", "npubbytes", "abytes")]
    return Cipher(NAMES[chosen], seal, open_, *sizes)
