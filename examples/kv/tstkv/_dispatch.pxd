# cython: language_level=3
"""The list of commands, and how a request finds its own."""
from libc.stdint cimport uint64_t
from libc.stdlib cimport abort
from libc.string cimport memset, strlen

from tstkv._admin cimport (
    client_getname, client_id, client_setinfo, client_setname, command_about, command_auth, command_command,
    command_count, command_docs, command_echo, command_hello, command_info, command_ping, command_quit, command_select,
    config_get, never_called)
from tstkv._call cimport (
    CALL_CLOSE, CALL_DONE, CALL_LONG, COMMAND_AT_ONCE, COMMAND_FAST, COMMAND_GROWS, COMMAND_LONG, COMMAND_READS,
    COMMAND_WRITES, COMMANDS_MOST, argument, argument_is, argument_size, kv_call, kv_command, kv_function, kv_queued,
    kv_server, n_arguments, reply_wrong_number)
from tstkv._keys cimport (
    command_dbsize, command_decr, command_decrby, command_del, command_exists, command_expire, command_flush,
    command_get, command_incr, command_incrby, command_keys, command_mget, command_mset, command_pexpire, command_pttl,
    command_set, command_ttl)
from tstkv._libc cimport kv_rarely
from tstkv._multi cimport command_discard, command_multi, exec_is_allowed, exec_refuse, queue_call, queued_forget
from tstkv._reply cimport reply_array, reply_peer_text, reply_text
from tstkv._resp cimport RESP_WHOLE, kv_request, request_free, request_init, request_reset, resp_parse
from tstkv._text cimport word_of

cdef enum:
    QUOTED_MOST = 128          # bytes of a client's words in an error

cdef enum:
    READS_FAST = COMMAND_READS | COMMAND_FAST
    READS_LONG = COMMAND_READS | COMMAND_LONG
    WRITES = COMMAND_WRITES
    WRITES_FAST = COMMAND_WRITES | COMMAND_FAST
    GROWS = COMMAND_WRITES | COMMAND_GROWS
    GROWS_FAST = COMMAND_WRITES | COMMAND_GROWS | COMMAND_FAST
    AT_ONCE = COMMAND_FAST | COMMAND_AT_ONCE


cdef inline kv_command *add(kv_server *server, const char *name, int arity, int flags,
                            kv_function function) noexcept nogil:
    """A command without keys; `name` is "get", or "config|get" for a subcommand of one that was added before."""
    cdef kv_command *command = &server.commands[server.n_commands]
    cdef size_t size = strlen(name), before = 0
    cdef int i
    if server.n_commands == COMMANDS_MOST:
        abort()                            # the list below is longer than its room
    while before < size and name[before] != c'|':
        before += 1
    command.name, command.arity, command.flags, command.function = name, arity, flags, function
    command.word = word_of(name, before)
    if before < size:
        command.parent = command.word
        command.word = word_of(name + before + 1, size - before - 1)
        for i in range(server.n_commands):
            if server.commands[i].word == command.parent and server.commands[i].parent == 0:
                server.commands[i].has_children = True
    server.n_commands += 1
    return command


cdef inline void add_keyed(kv_server *server, const char *name, int arity, int flags, kv_function function,
                           int last_key, int key_step) noexcept nogil:
    """A command whose first argument is a key."""
    cdef kv_command *command = add(server, name, arity, flags, function)
    command.first_key, command.last_key, command.key_step = 1, last_key, key_step


cdef inline void commands_init(kv_server *server) noexcept nogil:
    """Fills the list. It is searched from its beginning: what is most used comes first."""
    add_keyed(server, "get", 2, READS_FAST, command_get, 1, 1)
    add_keyed(server, "set", -3, GROWS, command_set, 1, 1)
    add(server, "ping", -1, COMMAND_FAST, command_ping)
    add_keyed(server, "incr", 2, GROWS_FAST, command_incr, 1, 1)
    add_keyed(server, "del", -2, WRITES, command_del, -1, 1)
    add_keyed(server, "exists", -2, READS_FAST, command_exists, -1, 1)
    add_keyed(server, "mget", -2, READS_FAST, command_mget, -1, 1)
    add_keyed(server, "mset", -3, GROWS, command_mset, -1, 2)
    add_keyed(server, "expire", -3, WRITES_FAST, command_expire, 1, 1)
    add_keyed(server, "ttl", 2, READS_FAST, command_ttl, 1, 1)
    add_keyed(server, "decr", 2, GROWS_FAST, command_decr, 1, 1)
    add_keyed(server, "incrby", 3, GROWS_FAST, command_incrby, 1, 1)
    add_keyed(server, "decrby", 3, GROWS_FAST, command_decrby, 1, 1)
    add_keyed(server, "pexpire", -3, WRITES_FAST, command_pexpire, 1, 1)
    add_keyed(server, "pttl", 2, READS_FAST, command_pttl, 1, 1)
    add(server, "echo", 2, COMMAND_FAST, command_echo)
    add(server, "keys", 2, READS_LONG, command_keys)
    add(server, "dbsize", 1, READS_FAST, command_dbsize)
    add(server, "flushdb", -1, WRITES, command_flush)
    add(server, "flushall", -1, WRITES, command_flush)
    add(server, "select", 2, COMMAND_FAST, command_select)
    add(server, "hello", -1, COMMAND_FAST, command_hello)
    add(server, "auth", -2, COMMAND_FAST, command_auth)
    add(server, "quit", -1, AT_ONCE, command_quit)
    add(server, "multi", 1, AT_ONCE, command_multi)
    add(server, "exec", 1, AT_ONCE, command_exec)
    add(server, "discard", 1, AT_ONCE, command_discard)
    add(server, "info", -1, COMMAND_LONG, command_info)
    add(server, "config", -2, 0, never_called)
    add(server, "config|get", -3, COMMAND_LONG, config_get)
    add(server, "client", -2, 0, never_called)
    add(server, "client|setname", 3, 0, client_setname)
    add(server, "client|getname", 2, 0, client_getname)
    add(server, "client|setinfo", 4, 0, client_setinfo)
    add(server, "client|id", 2, 0, client_id)
    add(server, "command", -1, COMMAND_LONG, command_command)
    add(server, "command|count", 2, 0, command_count)
    add(server, "command|docs", -2, 0, command_docs)
    add(server, "command|info", -2, COMMAND_LONG, command_about)


cdef inline kv_command *find(kv_server *server, uint64_t parent, uint64_t word) noexcept nogil:
    """The command of that name, or NULL."""
    cdef int i
    for i in range(server.n_commands):
        if server.commands[i].word == word and server.commands[i].parent == parent:
            return &server.commands[i]
    return NULL


cdef inline void reply_quoted(kv_call *call, size_t i, size_t most) noexcept nogil:
    """The first `most` bytes of argument `i` at most, between quotes."""
    cdef size_t size = argument_size(call, i)
    reply_text(call.reply, "'")
    reply_peer_text(call.reply, argument(call, i), most if size > most else size)
    reply_text(call.reply, "'")


cdef inline size_t visible_size(kv_call *call, size_t i, size_t most) noexcept nogil:
    """Of argument `i`, as far as reply_quoted shows it."""
    cdef const char *text = argument(call, i)
    cdef size_t size = 0
    while size < most and size < argument_size(call, i) and text[size]:
        size += 1
    return size


cdef inline void reply_unknown(kv_call *call) noexcept nogil:
    cdef size_t i, quoted = 0, n
    reply_text(call.reply, "-ERR unknown command ")
    reply_quoted(call, 0, QUOTED_MOST)
    reply_text(call.reply, ", with args beginning with: ")
    for i in range(1, n_arguments(call)):
        if quoted >= QUOTED_MOST:
            break
        n = visible_size(call, i, QUOTED_MOST - quoted)
        reply_quoted(call, i, QUOTED_MOST - quoted)
        reply_text(call.reply, " ")
        quoted += n + 3                    # with its quotes and the space
    reply_text(call.reply, "\r\n")


cdef inline void reply_unknown_child(kv_call *call) noexcept nogil:
    cdef size_t i
    cdef char letter
    reply_text(call.reply, "-ERR unknown subcommand ")
    reply_quoted(call, 1, QUOTED_MOST)
    reply_text(call.reply, ". Try ")
    for i in range(argument_size(call, 0)):
        letter = argument(call, 0)[i] & 0x5f       # a letter, for it has been found: in upper case
        reply_peer_text(call.reply, &letter, 1)
    reply_text(call.reply, " HELP.\r\n")


cdef inline bint arity_is_right(kv_call *call) noexcept nogil:
    cdef int arity = call.command.arity
    if arity < 0:
        return n_arguments(call) >= <size_t>-arity
    return n_arguments(call) == <size_t>arity


cdef inline bint is_http(kv_call *call) noexcept nogil:
    """These begin lines of HTTP, and no command. Who sends them is a browser, on behalf of a page that has put commands
    into the body of a request."""
    return argument_is(call, 0, "post") or argument_is(call, 0, "host:")


cdef inline bint find_command(kv_call *call) noexcept nogil:
    """Finds the request's command. False: none takes so many arguments, or none has the name; the client was told,
    unless it speaks HTTP."""
    cdef uint64_t word = word_of(argument(call, 0), argument_size(call, 0))
    call.command = find(call.server, 0, word)
    if kv_rarely(call.command == NULL):
        if not is_http(call):
            reply_unknown(call)
        return False
    if kv_rarely(call.command.has_children and n_arguments(call) > 1):
        call.command = find(call.server, word, word_of(argument(call, 1), argument_size(call, 1)))
        if call.command == NULL:
            reply_unknown_child(call)
            return False
    if kv_rarely(not arity_is_right(call)):
        if call.command.function == command_exec:
            exec_refuse(call)
        else:
            reply_wrong_number(call)
        return False
    return True


cdef inline int dispatch(kv_call *call) noexcept nogil:
    """Runs the request, which has at least one argument. Returns what the command returns."""
    if kv_rarely(not find_command(call)):
        call.client.queued.spoiled = call.client.queued.open
        return CALL_CLOSE if is_http(call) else CALL_DONE      # without a word, as Redis does it
    if kv_rarely(call.client.queued.open) and not call.command.flags & COMMAND_AT_ONCE:
        return queue_call(call)
    call.server.n_calls += 1
    return call.command.function(call)


cdef inline bint run_queued(kv_call *call, kv_queued *queued) noexcept nogil:
    """Runs what MULTI has queued; each was found to be right then. False: there was no memory for all of them."""
    cdef size_t at = 0, used = 0
    while at < queued.size and resp_parse(call.request, queued.bytes + at, queued.size - at,
                                          call.server.limits.argument, call.server.line, &used) == RESP_WHOLE:
        if find_command(call):
            call.server.n_calls += 1
            call.command.function(call)
        request_reset(call.request)
        at += used
    return at == queued.size


cdef inline int command_exec(kv_call *call) noexcept nogil:
    cdef kv_queued queued = call.client.queued
    cdef kv_request request
    cdef kv_call inner = call[0]
    cdef bint done
    if not exec_is_allowed(call):
        return CALL_DONE
    memset(&call.client.queued, 0, sizeof(kv_queued))
    memset(&request, 0, sizeof(kv_request))
    request_init(&request)
    inner.request = &request
    reply_array(call.reply, queued.n)
    done = run_queued(&inner, &queued)
    request_free(&request)
    queued_forget(&queued)
    return CALL_LONG if done else CALL_CLOSE   # fewer replies than were announced: nobody could tell whose they are
