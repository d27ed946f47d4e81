# cython: language_level=3, freethreading_compatible=True
"""The handler: tstpool's connections on one side, the server's layers (see _serve.pxd) on the other."""
import os

from libc.stdint cimport uint64_t

from tstkv._call cimport kv_client, kv_server
from tstkv._libc cimport pthread_mutex_lock, pthread_mutex_unlock
from tstkv._serve cimport (
    SERVE_CLOSE, SERVE_PAUSED, client_begin, client_forget, serve_again, serve_chunk, serve_end, server_free,
    server_init)
from tstkv._table cimport MAXMEMORY_LEAST, NO_MAXMEMORY
from tstpool cimport (
    TST_DISCONNECT, TST_SUSPEND, TstNogilHandler, TstSocket, TstStat, tst_need_send, tst_pause, tst_resume, tst_send)

cdef enum:
    ARGUMENT_MOST = 1 << 29    # Redis's own default; offsets in a request have 32 bits
    REQUEST_MOST = 1 << 30


cdef struct kv_stats:
    uint64_t keys
    uint64_t used_memory
    uint64_t clients
    uint64_t connections
    uint64_t commands
    uint64_t expired_keys


cdef kv_stats server_stats(kv_server *server) noexcept nogil:
    cdef kv_stats stats
    pthread_mutex_lock(&server.mutex)
    stats.keys = server.table.count
    stats.used_memory = server.table.used
    stats.clients = server.n_clients
    stats.connections = server.n_connections
    stats.commands = server.n_calls
    stats.expired_keys = server.table.n_expired
    pthread_mutex_unlock(&server.mutex)
    return stats


cdef ssize_t send_to(void *sock, const char *bytes, size_t size) noexcept nogil:
    return tst_send(<TstSocket>sock, bytes, size)


cdef TstStat apply(TstSocket sock, bint held_back, int outcome) noexcept nogil:
    """What has come of a turn; `held_back`: nothing was received before it."""
    cdef kv_client *client = <kv_client *>sock.state
    if outcome == SERVE_CLOSE or (outcome == SERVE_PAUSED and tst_need_send(sock) < 0):
        return TST_DISCONNECT
    if client.holds_back and not held_back:
        tst_pause(sock)
    elif held_back and not client.holds_back:
        tst_resume(sock)
    return TST_SUSPEND


cdef class KeyValueHandler(TstNogilHandler):
    """Serves a table of its own to all connections of the pools that it is given to. Bytes, all but maxclients:

    maxmemory: what keys and values may take together; 0: all there is. maxclients: connections at a time. max_argument:
    the longest key or value. max_request: what one client may have sent that is not run yet. max_waiting: the same of
    all clients, and replies that wait here. max_output: replies of one client that wait until it reads them.
    output_pause: from which on its requests wait too.

    A pool's high_water must be 65,536 at least, as it is unless it is told otherwise.
    """
    cdef kv_server server
    cdef bint ready

    def __cinit__(self, *, maxmemory=256 << 20, maxclients=10000, max_argument=32 << 20, max_request=64 << 20,
                  max_waiting=1 << 30, max_output=256 << 20, output_pause=1 << 20):
        cdef uint64_t hash_key[2]
        if not 0 < max_argument <= ARGUMENT_MOST or not max_argument <= max_request <= REQUEST_MOST:
            raise ValueError(f"max_argument may be 1 to {ARGUMENT_MOST}, max_request that to {REQUEST_MOST}")
        if maxmemory != 0 and not MAXMEMORY_LEAST <= maxmemory <= NO_MAXMEMORY:
            raise ValueError(f"maxmemory may be 0, for no limit, or {MAXMEMORY_LEAST} to {NO_MAXMEMORY}")
        self.server.limits.argument = max_argument
        self.server.limits.request = max_request
        self.server.limits.waiting = max_waiting
        self.server.limits.output = max_output
        self.server.limits.output_pause = output_pause
        self.server.limits.clients = maxclients
        for i in range(2):
            hash_key[i] = int.from_bytes(os.urandom(8), "little")
        self.ready = True
        if server_init(&self.server, maxmemory or NO_MAXMEMORY, hash_key) < 0:
            raise MemoryError()
        self.state_size = sizeof(kv_client)

    def __dealloc__(self):
        if self.ready:
            server_free(&self.server)

    cdef TstStat connected(self, TstSocket sock) noexcept nogil:
        cdef bint welcome
        pthread_mutex_lock(&self.server.mutex)
        welcome = client_begin(&self.server, <kv_client *>sock.state)
        pthread_mutex_unlock(&self.server.mutex)
        if welcome:
            return TST_SUSPEND
        tst_send(sock, b"-ERR max number of clients reached\r\n", 36)
        return TST_DISCONNECT

    cdef TstStat received(self, TstSocket sock, const char *data, size_t size) noexcept nogil:
        cdef bint held_back = (<kv_client *>sock.state).holds_back
        cdef int outcome
        pthread_mutex_lock(&self.server.mutex)
        outcome = serve_chunk(&self.server, <kv_client *>sock.state, data, size, send_to, <void *>sock)
        pthread_mutex_unlock(&self.server.mutex)
        return apply(sock, held_back, outcome)

    cdef TstStat writable(self, TstSocket sock) noexcept nogil:
        cdef bint held_back = (<kv_client *>sock.state).holds_back
        cdef int outcome
        pthread_mutex_lock(&self.server.mutex)
        outcome = serve_again(&self.server, <kv_client *>sock.state, send_to, <void *>sock)
        pthread_mutex_unlock(&self.server.mutex)
        return apply(sock, held_back, outcome)

    cdef void disconnected(self, TstSocket sock) noexcept nogil:
        pthread_mutex_lock(&self.server.mutex)
        serve_end(&self.server, <kv_client *>sock.state)
        pthread_mutex_unlock(&self.server.mutex)

    cdef void release(self, void *state) noexcept nogil:
        pthread_mutex_lock(&self.server.mutex)
        client_forget(&self.server, <kv_client *>state)
        pthread_mutex_unlock(&self.server.mutex)

    def stats(self):
        """{"keys", "used_memory", "clients", "connections", "commands", "expired_keys"}: as INFO gives them."""
        cdef kv_stats stats
        # Who holds the mutex may take long. And while we do, no code of Python may run: a finalizer could come here.
        with nogil:
            stats = server_stats(&self.server)
        return stats                           # as a dict
