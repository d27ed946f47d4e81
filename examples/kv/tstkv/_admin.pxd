# cython: language_level=3
"""The commands that are about the connection and the server: what clients ask before they ask for keys."""
from libc.stdint cimport int64_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memcmp, memcpy, strlen

from tstkv._call cimport (
    CALL_CLOSE, CALL_DONE, CALL_LONG, COMMAND_FAST, COMMAND_GROWS, COMMAND_READS, COMMAND_WRITES, NAME_MOST, argument,
    argument_integer, argument_is, argument_size, kv_call, kv_command, kv_server, n_arguments, reply_syntax,
    reply_wrong_number)
from tstkv._glob cimport glob_is_too_long, glob_matches
from tstkv._reply cimport (
    kv_reply, reply_array, reply_bulk, reply_bulk_text, reply_error, reply_integer, reply_lines, reply_map, reply_null,
    reply_ok, reply_peer_text, reply_set, reply_text)
from tstkv._table cimport NO_MAXMEMORY
from tstkv._text cimport text_to_integer, word_of

cdef enum:
    NUMBER_ROOM = 24
    INFO_ROOM = 1024
    SETTINGS = 7               # that CONFIG GET knows
    SETTINGS_STEPS = 1 << 22   # that it may take to compare their names


cdef extern from * nogil:
    """
    #define KV_VERSION "0.1.0"
    #define KV_REDIS_VERSION "7.0.15"
    """
    const char *KV_VERSION
    const char *KV_REDIS_VERSION           # whose replies these are


# -------------------------------------------------------------------------------------------- the connection

cdef inline int command_ping(kv_call *call) noexcept nogil:
    if n_arguments(call) == 1:
        reply_text(call.reply, "+PONG\r\n")
    elif n_arguments(call) == 2:
        reply_bulk(call.reply, argument(call, 1), argument_size(call, 1))
    else:
        reply_wrong_number(call)
    return CALL_DONE


cdef inline int command_echo(kv_call *call) noexcept nogil:
    reply_bulk(call.reply, argument(call, 1), argument_size(call, 1))
    return CALL_DONE


cdef inline int command_quit(kv_call *call) noexcept nogil:
    reply_ok(call.reply)
    return CALL_CLOSE


cdef inline int command_select(kv_call *call) noexcept nogil:
    """There is one database, number 0."""
    cdef int64_t number = 0
    if not argument_integer(call, 1, &number):
        return CALL_DONE
    if number == 0:
        reply_ok(call.reply)
    elif not -2147483648 <= number <= 2147483647:
        reply_error(call.reply, "value is out of range, value must between -2147483648 and 2147483647")
    else:
        reply_error(call.reply, "DB index is out of range")
    return CALL_DONE


cdef inline bint client_name(kv_call *call, size_t i) noexcept nogil:
    """Takes argument `i` as the client's name. False: it can't be one, and the client has been told."""
    cdef const char *name = argument(call, i)
    cdef size_t k
    if argument_size(call, i) > NAME_MOST:
        reply_error(call.reply, "Client names cannot be that long.")
        return False
    for k in range(argument_size(call, i)):
        if not c'!' <= name[k] <= c'~':
            reply_error(call.reply, "Client names cannot contain spaces, newlines or special characters.")
            return False
    call.client.name_size = argument_size(call, i)
    memcpy(call.client.name, name, call.client.name_size)
    return True


cdef inline int client_setname(kv_call *call) noexcept nogil:
    if client_name(call, 2):
        reply_ok(call.reply)
    return CALL_DONE


cdef inline int client_getname(kv_call *call) noexcept nogil:
    if call.client.name_size:
        reply_bulk(call.reply, call.client.name, call.client.name_size)
    else:
        reply_null(call.reply)
    return CALL_DONE


cdef inline int client_setinfo(kv_call *call) noexcept nogil:
    """Which library the client uses: nothing here asks for it."""
    reply_ok(call.reply)
    return CALL_DONE


cdef inline int client_id(kv_call *call) noexcept nogil:
    reply_integer(call.reply, <int64_t>call.client.id)
    return CALL_DONE


cdef inline bint user_exists(kv_call *call, size_t i) noexcept nogil:
    """Argument `i` is the one user that a Redis without passwords has. Any password is right for it. False: the client
    has been told."""
    if argument_size(call, i) == 7 and memcmp(argument(call, i), "default", 7) == 0:
        return True
    reply_text(call.reply, "-WRONGPASS invalid username-password pair or user is disabled.\r\n")
    return False


cdef inline int command_auth(kv_call *call) noexcept nogil:
    if n_arguments(call) > 3:
        reply_syntax(call)
    elif n_arguments(call) == 2:
        reply_error(call.reply, "AUTH <password> called without any password configured for the default user. "
                    "Are you sure your configuration is correct?")
    elif user_exists(call, 1):
        reply_ok(call.reply)
    return CALL_DONE


cdef inline bint hello_options(kv_call *call) noexcept nogil:
    """False: the client has been told what is wrong."""
    cdef size_t i = 2
    while i < n_arguments(call):
        if argument_is(call, i, "auth") and i + 2 < n_arguments(call):
            if not user_exists(call, i + 1):
                return False
            i += 3
        elif argument_is(call, i, "setname") and i + 1 < n_arguments(call):
            if not client_name(call, i + 1):
                return False
            i += 2
        else:
            reply_text(call.reply, "-ERR Syntax error in HELLO option '")
            reply_peer_text(call.reply, argument(call, i), argument_size(call, i))
            reply_text(call.reply, "'\r\n")
            return False
    return True


cdef inline int command_hello(kv_call *call) noexcept nogil:
    cdef int64_t version = 3 if call.client.resp3 else 2
    if n_arguments(call) > 1:
        if not text_to_integer(argument(call, 1), argument_size(call, 1), &version):
            reply_error(call.reply, "Protocol version is not an integer or out of range")
            return CALL_DONE
        if not 2 <= version <= 3:
            reply_text(call.reply, "-NOPROTO unsupported protocol version\r\n")
            return CALL_DONE
    if not hello_options(call):
        return CALL_DONE
    call.client.resp3 = call.reply.resp3 = version == 3
    reply_map(call.reply, 7)
    reply_bulk_text(call.reply, "server")
    reply_bulk_text(call.reply, "redis")   # what clients look for
    reply_bulk_text(call.reply, "version")
    reply_bulk_text(call.reply, KV_REDIS_VERSION)
    reply_bulk_text(call.reply, "proto")
    reply_integer(call.reply, version)
    reply_bulk_text(call.reply, "id")
    reply_integer(call.reply, <int64_t>call.client.id)
    reply_bulk_text(call.reply, "mode")
    reply_bulk_text(call.reply, "standalone")
    reply_bulk_text(call.reply, "role")
    reply_bulk_text(call.reply, "master")
    reply_bulk_text(call.reply, "modules")
    reply_array(call.reply, 0)
    return CALL_DONE


cdef inline int never_called(kv_call *call) noexcept nogil:
    """For a command of which only the subcommands do something: its arity asks for one."""
    return CALL_DONE


# ----------------------------------------------------------------------------------------------- the server

cdef inline uint64_t maxmemory_shown(kv_server *server) noexcept nogil:
    """0: there is no limit."""
    return 0 if server.table.maxmemory == NO_MAXMEMORY else server.table.maxmemory


cdef inline void info_text(kv_call *call, char *text) noexcept nogil:
    """Writes INFO_ROOM bytes at most."""
    cdef kv_server *server = call.server
    snprintf(
        text, INFO_ROOM,
        "# Server\r\nredis_version:%s\r\nredis_mode:standalone\r\ntstkv_version:%s\r\nuptime_in_seconds:%llu\r\n\r\n"
        "# Clients\r\nconnected_clients:%llu\r\nmaxclients:%llu\r\nblocked_clients:0\r\n\r\n"
        "# Memory\r\nused_memory:%llu\r\nmem_clients_normal:%llu\r\nmaxmemory:%llu\r\n"
        "maxmemory_policy:noeviction\r\n\r\n"
        "# Stats\r\ntotal_connections_received:%llu\r\ntotal_commands_processed:%llu\r\nexpired_keys:%llu\r\n\r\n"
        "# Keyspace\r\n",
        KV_REDIS_VERSION, KV_VERSION, <unsigned long long>((call.now - server.started) // 1000),
        <unsigned long long>server.n_clients, <unsigned long long>server.limits.clients,
        <unsigned long long>server.table.used, <unsigned long long>server.waiting_memory,
        <unsigned long long>maxmemory_shown(server), <unsigned long long>server.n_connections,
        <unsigned long long>server.n_calls, <unsigned long long>server.table.n_expired)


cdef inline int command_info(kv_call *call) noexcept nogil:
    """All of it, whatever section is asked for: it is short."""
    cdef char text[INFO_ROOM + 128]
    cdef size_t size
    info_text(call, text)
    size = strlen(text)
    if call.server.table.count:
        snprintf(text + size, 128, "db0:keys=%llu,expires=%llu,avg_ttl=0\r\n",
                 <unsigned long long>call.server.table.count, <unsigned long long>call.server.table.n_expiring)
    reply_lines(call.reply, text)
    return CALL_LONG


cdef inline const char *setting(kv_server *server, int i, char *number, const char **value) noexcept nogil:
    """The name of the setting `i` and its value, for which `number` has NUMBER_ROOM bytes."""
    cdef uint64_t amount = 0
    value[0] = number
    if i == 0:
        value[0] = ""
        return "save"
    if i == 1:
        value[0] = "no"
        return "appendonly"
    if i == 2:
        value[0] = "1"
        return "databases"
    if i == 3:
        value[0] = "noeviction"
        return "maxmemory-policy"
    amount = (maxmemory_shown(server) if i == 4 else server.limits.clients if i == 5 else server.limits.argument)
    snprintf(number, NUMBER_ROOM, "%llu", <unsigned long long>amount)
    return "maxmemory" if i == 4 else "maxclients" if i == 5 else "proto-max-bulk-len"


cdef inline size_t setting_asked_for(kv_call *call, const char *name, uint64_t *steps) noexcept nogil:
    """The argument of CONFIG GET that `name` matches, or 0."""
    cdef size_t i
    for i in range(2, n_arguments(call)):
        if glob_is_too_long(argument(call, i), argument_size(call, i)):
            continue                           # no setting has such a name
        if glob_matches(argument(call, i), argument_size(call, i), name, strlen(name), True, steps):
            return i
    return 0


cdef inline int config_get(kv_call *call) noexcept nogil:
    cdef char number[NUMBER_ROOM]
    cdef const char *value = NULL
    cdef const char *name
    cdef uint64_t steps = SETTINGS_STEPS
    cdef size_t asked[SETTINGS]
    cdef size_t n = 0
    cdef int i
    for i in range(SETTINGS):
        asked[i] = setting_asked_for(call, setting(call.server, i, number, &value), &steps)
        n += asked[i] != 0
    reply_map(call.reply, n)
    for i in range(SETTINGS):
        if asked[i] == 0:
            continue
        name = setting(call.server, i, number, &value)
        if argument_is(call, asked[i], name):
            reply_bulk(call.reply, argument(call, asked[i]), argument_size(call, asked[i]))    # as it was spelt
        else:
            reply_bulk_text(call.reply, name)
        reply_bulk_text(call.reply, value)
    return CALL_LONG


# --------------------------------------------------------------------------------------- the commands themselves

cdef inline void reply_flag(kv_reply *reply, const kv_command *command, int flag, const char *name) noexcept nogil:
    if command.flags & flag:
        reply_text(reply, "+")
        reply_text(reply, name)
        reply_text(reply, "\r\n")


cdef inline void reply_command(kv_reply *reply, const kv_command *command) noexcept nogil:
    """As COMMAND describes one. What nothing here uses is empty: categories, tips, key specifications, subcommands."""
    cdef int i
    cdef size_t n_flags = 0
    reply_array(reply, 10)
    reply_bulk_text(reply, command.name)
    reply_integer(reply, command.arity)
    for i in range(4):
        n_flags += (command.flags >> i) & 1
    reply_set(reply, n_flags)
    reply_flag(reply, command, COMMAND_WRITES, "write")
    reply_flag(reply, command, COMMAND_READS, "readonly")
    reply_flag(reply, command, COMMAND_GROWS, "denyoom")
    reply_flag(reply, command, COMMAND_FAST, "fast")
    reply_integer(reply, command.first_key)
    reply_integer(reply, command.last_key)
    reply_integer(reply, command.key_step)
    reply_set(reply, 0)
    reply_set(reply, 0)
    reply_set(reply, 0)
    reply_array(reply, 0)


cdef inline size_t count_commands(const kv_server *server) noexcept nogil:
    cdef size_t n = 0
    cdef int i
    for i in range(server.n_commands):
        n += server.commands[i].parent == 0
    return n


cdef inline int command_command(kv_call *call) noexcept nogil:
    cdef int i
    reply_array(call.reply, count_commands(call.server))
    for i in range(call.server.n_commands):
        if call.server.commands[i].parent == 0:
            reply_command(call.reply, &call.server.commands[i])
    return CALL_LONG


cdef inline int command_count(kv_call *call) noexcept nogil:
    reply_integer(call.reply, <int64_t>count_commands(call.server))
    return CALL_DONE


cdef inline int command_docs(kv_call *call) noexcept nogil:
    """There are none; redis-cli then does without."""
    reply_map(call.reply, 0)
    return CALL_DONE


cdef inline int command_about(kv_call *call) noexcept nogil:
    """COMMAND INFO: those that are named, or all."""
    cdef kv_server *server = call.server
    cdef uint64_t word
    cdef size_t i
    cdef int k
    if n_arguments(call) == 2:
        return command_command(call)
    reply_array(call.reply, n_arguments(call) - 2)
    for i in range(2, n_arguments(call)):
        word = word_of(argument(call, i), argument_size(call, i))
        for k in range(server.n_commands):
            if server.commands[k].word == word and server.commands[k].parent == 0:
                reply_command(call.reply, &server.commands[k])
                break
        else:
            reply_null(call.reply)
    return CALL_LONG
