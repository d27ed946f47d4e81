# cython: language_level=3
"""SipHash-1-3 (Aumasson, Bernstein), the keyed hash: who does not know the key cannot choose keys that collide.

Peers choose the keys of the table. With a hash that they can compute they could put a million keys into one place and
make each look-up as slow as a search through all of them.
"""
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy


cdef inline uint64_t rotated(uint64_t word, int bits) noexcept nogil:
    return word << bits | word >> (64 - bits)


cdef inline void sip_round(uint64_t *v) noexcept nogil:
    v[0] += v[1]
    v[2] += v[3]
    v[1] = rotated(v[1], 13) ^ v[0]
    v[3] = rotated(v[3], 16) ^ v[2]
    v[0] = rotated(v[0], 32)
    v[2] += v[1]
    v[0] += v[3]
    v[1] = rotated(v[1], 17) ^ v[2]
    v[3] = rotated(v[3], 21) ^ v[0]
    v[2] = rotated(v[2], 32)


cdef inline uint64_t sip_hash(const uint64_t *key, const char *bytes, size_t size) noexcept nogil:
    """The hash of `bytes` under the two words of `key`."""
    cdef uint64_t v[4]
    cdef uint64_t word
    cdef size_t i, whole = size & ~<size_t>7
    v[0] = key[0] ^ 0x736f6d6570736575ULL
    v[1] = key[1] ^ 0x646f72616e646f6dULL
    v[2] = key[0] ^ 0x6c7967656e657261ULL
    v[3] = key[1] ^ 0x7465646279746573ULL
    for i in range(0, whole, 8):
        memcpy(&word, bytes + i, 8)
        v[3] ^= word
        sip_round(v)
        v[0] ^= word
    word = <uint64_t>size << 56
    for i in range(whole, size):
        word |= <uint64_t><uint8_t>bytes[i] << (8 * (i - whole))
    v[3] ^= word
    sip_round(v)
    v[0] ^= word
    v[2] ^= 0xff
    sip_round(v)
    sip_round(v)
    sip_round(v)
    return v[0] ^ v[1] ^ v[2] ^ v[3]
