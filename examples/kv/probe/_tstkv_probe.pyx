# cython: language_level=3, freethreading_compatible=True
"""For the tests alone: the layers of tstkv without a connection, so that time, memory and every split of a request are
the test's to choose. Built only with TSTKV_PROBE=1."""
from libc.errno cimport ENOBUFS
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset

from tstkv._call cimport kv_client, kv_server
from tstkv._glob cimport glob_matches
from tstkv._serve cimport (
    SERVE_CLOSE, SERVE_MORE, SERVE_PAUSED, client_begin, client_forget, serve_again, serve_chunk, serve_end,
    server_free, server_init)
from tstkv._siphash cimport sip_hash
from tstkv._table cimport (
    entry_expire, entry_key, entry_value, kv_entry, kv_slot, kv_table, memory_for, room_for, table_clear, table_find,
    table_free, table_hash, table_init, table_next, table_prepare, table_remove, table_set, table_sweep)
from tstkv._text cimport INTEGER_MOST, integer_to_text, text_to_integer

cdef extern from * nogil:
    """
    #include <stdlib.h>

    static size_t probe_mallocs_left;          /* until one fails; 0: none does */
    static size_t probe_reallocs_left;

    static void *probe_malloc(size_t size) {
        return probe_mallocs_left && --probe_mallocs_left == 0 ? NULL : malloc(size);
    }

    static void *probe_realloc(void *memory, size_t size) {
        return probe_reallocs_left && --probe_reallocs_left == 0 ? NULL : realloc(memory, size);
    }

    #define malloc probe_malloc
    #define realloc probe_realloc
    """
    size_t probe_mallocs_left
    size_t probe_reallocs_left

MORE, PAUSED, CLOSE = SERVE_MORE, SERVE_PAUSED, SERVE_CLOSE


def fail_realloc(size_t n):
    """The layers get no memory when they next grow something, or, with n, when they do it for the n-th time."""
    global probe_reallocs_left
    probe_reallocs_left = n


def fail_malloc(size_t n):
    """The n-th time from now on that the layers ask for memory, they get none."""
    global probe_mallocs_left
    probe_mallocs_left = n


def siphash(bytes key, bytes data):
    cdef uint64_t words[2]
    words[0], words[1] = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
    return sip_hash(words, data, len(data))


def glob(bytes pattern, bytes text, bint any_case=False, uint64_t steps=1 << 60):
    return bool(glob_matches(pattern, len(pattern), text, len(text), any_case, &steps))


def to_integer(bytes text):
    """None: it is none."""
    cdef int64_t number = 0
    return number if text_to_integer(text, len(text), &number) else None


def from_integer(int64_t number):
    cdef char text[INTEGER_MOST]
    return text[:integer_to_text(number, text)]


cdef class Server:
    cdef kv_server server
    cdef bint ready

    def __cinit__(self, *, maxmemory=1 << 30, argument=1 << 20, request=1 << 21, waiting=1 << 30, output=1 << 30,
                  output_pause=1 << 30, clients=1000):
        cdef uint64_t key[2]
        key[0], key[1] = 1, 2
        self.server.limits.argument, self.server.limits.request = argument, request
        self.server.limits.waiting, self.server.limits.output = waiting, output
        self.server.limits.output_pause, self.server.limits.clients = output_pause, clients
        self.ready = True
        if server_init(&self.server, maxmemory, key) < 0:
            raise MemoryError()

    def __dealloc__(self):
        if self.ready:
            server_free(&self.server)

    @property
    def waiting_memory(self):
        return self.server.waiting_memory

    @property
    def used(self):
        return self.server.table.used

    @property
    def n_clients(self):
        return self.server.n_clients


cdef ssize_t keep_reply(void *client, const char *bytes, size_t size) noexcept nogil:
    with gil:
        if (<Client>client).busy:
            return -ENOBUFS
        (<Client>client).replies += bytes[:size]
        return -1 if (<Client>client).refuses else len((<Client>client).replies)


cdef class Client:
    """`replies` wait until the test takes them, as they would wait for a peer to read them."""
    cdef kv_client client
    cdef Server server
    cdef public bytearray replies
    cdef public bint refuses               # it takes nothing more
    cdef public bint busy                  # ... for now
    cdef readonly bint welcome

    def __init__(self, Server server):
        self.server = server
        self.replies = bytearray()
        self.welcome = client_begin(&server.server, &self.client)

    def __dealloc__(self):
        if self.server is not None:
            client_forget(&self.server.server, &self.client)

    @property
    def unread(self):
        return self.client.end - self.client.begin

    def take(self):
        taken, self.replies = bytes(self.replies), bytearray()
        return taken

    def feed(self, bytes data):
        return serve_chunk(&self.server.server, &self.client, data, len(data), keep_reply, <void *>self)

    def again(self):
        return serve_again(&self.server.server, &self.client, keep_reply, <void *>self)

    def end(self):
        serve_end(&self.server.server, &self.client)


cdef class Table:
    cdef kv_table table

    def __cinit__(self, uint64_t maxmemory=1 << 30, bytes key=bytes(16)):
        cdef uint64_t words[2]
        words[0], words[1] = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
        memset(&self.table, 0, sizeof(self.table))
        if table_init(&self.table, maxmemory, words) < 0:
            raise MemoryError()

    def __dealloc__(self):
        table_free(&self.table)

    def __len__(self):
        return self.table.count

    @property
    def used(self):
        return self.table.used

    @property
    def capacity(self):
        return self.table.capacity

    @property
    def growing(self):
        return self.table.old != NULL

    @property
    def n_expiring(self):
        return self.table.n_expiring

    def prepare(self, more, memory, now=1):
        """False: there is not so much memory."""
        return table_prepare(&self.table, more, memory, now) == 0

    def set(self, bytes key, bytes value, int64_t expires=0, int64_t now=1):
        """False: there is no memory for it."""
        cdef uint64_t hash = table_hash(&self.table, key, len(key))
        cdef kv_slot *slot
        cdef kv_entry *entry
        if table_prepare(&self.table, 1, memory_for(room_for(len(key), len(value))), now) < 0:
            return False
        slot = table_find(&self.table, hash, key, len(key), now)
        entry = table_set(&self.table, hash, slot, key, len(key), value, len(value))
        if entry == NULL:
            raise MemoryError()
        entry_expire(&self.table, entry, expires)
        return True

    cdef kv_slot *find(self, bytes key, int64_t now):
        return table_find(&self.table, table_hash(&self.table, key, len(key)), key, len(key), now)

    def get(self, bytes key, int64_t now=1):
        cdef kv_slot *slot = self.find(key, now)
        return None if slot == NULL else entry_value(slot.entry)[:slot.entry.value_size]

    def remove(self, bytes key, int64_t now=1):
        cdef kv_slot *slot = self.find(key, now)
        if slot != NULL:
            table_remove(&self.table, slot)
        return slot != NULL

    def sweep(self, size_t steps, int64_t now):
        table_sweep(&self.table, steps, now)

    def clear(self):
        table_clear(&self.table)

    def items(self, int64_t now=1):
        cdef size_t i = 0
        cdef kv_entry *entry = NULL
        found = []
        while table_next(&self.table, &i, now, &entry):
            if entry != NULL:
                found.append((entry_key(entry)[:entry.key_size], entry_value(entry)[:entry.value_size]))
        return found
