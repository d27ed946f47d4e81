"""White box: the layers of examples/kv, without a connection: time, memory and every split are the test's to choose."""

import random
import re
import sys
import time

import pytest
from helpers import patient, run_python, scaled
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_example import SOURCE, array, cut, elements, probe, replies

pytestmark = pytest.mark.skipif(not SOURCE.is_dir(), reason="needs examples/")

SLOT, ENTRY, EXTRA = 16, 24, 16  # bytes: of a slot, of an entry beside key and value, of malloc


@pytest.fixture
def kv():
    return probe()


def fed(client, pieces):
    """The last outcome."""
    outcome = probe().MORE
    for piece in pieces:
        outcome = client.feed(piece)
        while outcome == probe().PAUSED:  # the clock says that it was much work
            outcome = client.again()
        if outcome == probe().CLOSE:
            break
    return outcome


# ------------------------------------------------------------------------------------------- hash, numbers, globs


def test_the_hash_is_siphash_1_3(kv):
    """Python's own hash of bytes is the same function, and PYTHONHASHSEED=0 gives it a key of zeros."""
    if sys.hash_info.algorithm != "siphash13":
        pytest.skip(f"this Python's hash is {sys.hash_info.algorithm}")
    code = "print(*[hash(bytes(range(n))) for n in range(1, 100)])"
    expected = run_python("-c", code, env={"PYTHONHASHSEED": "0"}).stdout.split()
    found = [kv.siphash(bytes(16), bytes(range(n))) for n in range(1, 100)]
    assert found == [int(number) % 2**64 for number in expected]
    assert kv.siphash(bytes(15) + b"\1", b"abc") != kv.siphash(bytes(16), b"abc")


@settings(deadline=None)
@given(
    st.one_of(
        st.integers(-(2**65), 2**65).map(lambda n: b"%d" % n), st.text("-+0123456789 x", max_size=21).map(str.encode)
    )
)
def test_an_integer_is_written_in_one_way_only(text):
    valid = re.fullmatch(rb"0|-?[1-9][0-9]*", text) and -(2**63) <= int(text) < 2**63
    assert probe().to_integer(text) == (int(text) if valid else None)


@pytest.mark.parametrize("number", [0, 1, -1, 9, 10, -10, 2**63 - 1, -(2**63)])
def test_an_integer_and_its_text_say_the_same(kv, number):
    assert kv.from_integer(number) == b"%d" % number
    assert kv.to_integer(b"%d" % number) == number


@pytest.mark.parametrize(
    ("pattern", "text", "matches"),
    [
        (b"h?llo", b"hello", True),
        (b"h*llo", b"heeeello", True),
        (b"h[ae]llo", b"hillo", False),
        (b"h[^e]llo", b"hallo", True),
        (b"h[c-a]llo", b"hbllo", True),
        (rb"h\*llo", b"hello", False),
        (rb"h[\]]llo", b"h]llo", True),
        (b"h[ab", b"ha", True),
        (rb"[\1", b"1", True),
        (rb"[\1", b"\\", False),
        (b"", b"", True),
        (b"**", b"", False),
        (b"a*", b"a", True),
        (b"*a*b*", b"xxaxxbxx", True),
        (b"*ab", b"aab", True),
        (b"\\", b"\\", True),
    ],
)
def test_a_pattern_matches_what_redis_says(kv, pattern, text, matches):
    assert kv.glob(pattern, text) is matches
    assert kv.glob(pattern.upper(), text, True) is matches


def test_the_ends_of_a_range_are_ordered_before_their_case_is_forgotten(kv):
    assert kv.glob(b"[C-a]", b"b", True) is False
    assert kv.glob(b"[a-C]", b"B", True) is False
    assert kv.glob(b"[A-C]", b"b", True) is kv.glob(b"[c-a]", b"B", True) is True


def test_a_pattern_of_many_stars_takes_no_exponential_time(kv):
    begin = time.thread_time()
    assert kv.glob(b"*a" * 200 + b"b", b"a" * 5000) is False
    assert time.thread_time() - begin < patient(5)


def test_what_a_pattern_may_take_is_limited(kv):
    assert kv.glob(b"*ab", b"aab" * 5, steps=1000) is True
    assert kv.glob(b"*ab", b"aab" * 5, steps=10) is False


def test_keys_and_config_get_end_soon_whatever_the_pattern_and_the_keys(kv):
    server = kv.Server(argument=1 << 24, request=1 << 25)
    client = kv.Client(server)
    assert fed(client, [array(b"SET", b"a" * (8 << 20), b"1") + array(b"SET", b"short", b"2")]) == kv.MORE
    assert client.take() == b"+OK\r\n" * 2
    begin = time.thread_time()
    assert fed(client, [array(b"KEYS", b"*" + b"a" * 1022 + b"b")]) == kv.MORE
    assert client.take() == b"-ERR pattern takes too long\r\n"
    assert time.thread_time() - begin < patient(1)
    assert fed(client, [array(b"KEYS", b"*o*t")]) == kv.MORE  # goes through the long one from end to end
    assert client.take() == b"*1\r\n$5\r\nshort\r\n"
    begin = time.thread_time()
    assert fed(client, [array(b"CONFIG", b"GET", *[b"*[" + b"x" * 1000 + b"]"] * 10_000, b"save")]) == kv.MORE
    assert client.take() == b"*0\r\n"
    assert time.thread_time() - begin < patient(1)


TOO_LONG = b"-ERR pattern takes too long\r\n"


def test_all_keys_of_a_transaction_share_what_one_may_take(kv):
    """Nobody else is served before EXEC ends. With a key of a megabyte there are 19 million steps."""
    client = kv.Client(kv.Server(argument=1 << 20))
    key = b"a" * ((1 << 20) - 1) + b"b"
    assert fed(client, [array(b"SET", key, b"")]) == kv.MORE
    none, one = b"KEYS *aaaaaaaaaac\n", b"KEYS *aaaab\n"  # 11 million steps; 5 million, twice: to count, and to tell
    found = b"*1\r\n$%d\r\n%s\r\n" % (len(key), key)
    for requests, expected in (
        (none * 4, [b"*0\r\n", TOO_LONG, TOO_LONG, TOO_LONG]),
        (one * 3 + b"GET x\nKEYS *\n", [found, found, TOO_LONG, b"$-1\r\n", TOO_LONG]),
        (none, [b"*0\r\n"]),  # the next transaction has steps of its own
    ):
        client.take()
        assert fed(client, [b"MULTI\n" + requests + b"EXEC\n"]) == kv.MORE
        assert elements(replies(client.take())[-1]) == expected
    assert fed(client, [none * 3 + one * 4]) == kv.MORE  # as has each request that is in none
    assert replies(client.take()) == [b"*0\r\n"] * 3 + [found] * 4


def test_keys_finds_all_of_many_with_a_pattern_that_is_not_simple(kv):
    client = kv.Client(kv.Server())
    for begin in range(0, 50_000, 10_000):
        words = [word for i in range(begin, begin + 10_000) for word in (b"user:session:%08d:x" % i, b"")]
        assert fed(client, [array(b"MSET", *words)]) == kv.MORE
        client.take()
    assert fed(client, [array(b"KEYS", b"*[0-9][0-9][0-9]5*[a-z]")]) == kv.MORE
    expected = sum(bool(re.search(b"[0-9]{3}5", b"%08d" % i)) for i in range(50_000))
    assert client.take().startswith(b"*%d\r\n" % expected)


# ---------------------------------------------------------------------------------------------------- the table


def memory_of(items):
    return sum(ENTRY + EXTRA + (len(key) + len(value) + 15) // 16 * 16 for key, value in items)


@pytest.mark.parametrize("seed", range(5))
def test_the_table_does_what_a_dict_does_while_it_grows_and_shrinks(kv, seed):
    chance = random.Random(seed)
    table, model = kv.Table(key=chance.randbytes(16)), {}
    n = scaled(3000, minimum=300)
    for round_no in range(n):
        key = b"%d" % chance.randrange(n)
        if chance.random() < (0.8 if round_no < n // 2 else 0.3):
            value = chance.randbytes(chance.choice([0, 1, 5, 40, 300]))
            assert table.set(key, value)
            model[key] = value
        else:
            assert table.remove(key) == (model.pop(key, None) is not None)
        key = b"%d" % chance.randrange(n)
        assert table.get(key) == model.get(key)
        assert len(table) == len(model)
        if round_no % 100 == 0:
            assert sorted(table.items()) == sorted(model.items())
    assert sorted(table.items()) == sorted(model.items())
    for key in list(model):
        assert table.remove(key)
    assert table.items() == []
    assert table.get(b"1") is None


def test_keys_of_one_slot_are_told_apart(kv):
    """Their hashes end with the same bits, as an attacker who knew the key would choose them."""
    chosen = [key for key in (b"%d" % i for i in range(60_000)) if kv.siphash(bytes(16), key) & 0x3FF == 0x3FF]
    assert len(chosen) > 30
    table, chance = kv.Table(), random.Random(1)
    for key in chosen:
        assert table.set(key, b"v" + key)
    for _ in range(3):
        chance.shuffle(chosen)
        for i, key in enumerate(chosen):
            assert table.remove(key)
            assert all(table.get(other) == b"v" + other for other in chosen[i + 1 :])
        for key in chosen:
            assert table.set(key, b"v" + key)


def test_growing_moves_few_entries_at_a_time_and_ends_before_the_next_growth(kv):
    table = kv.Table()
    keys, grew = [], 0
    while table.capacity < 1 << 14:
        capacity, was_growing = table.capacity, table.growing
        keys.append(b"%d" % len(keys))
        assert table.set(keys[-1], b"x")
        if table.capacity > capacity:
            grew += 1
            assert not was_growing
            assert table.growing and table.capacity == 2 * capacity
        assert len(table) <= table.capacity // 4 * 3
        assert table.get(keys[len(keys) // 2]) == b"x"
    assert grew == 10
    while table.growing:
        assert table.set(b"more", b"x")
    assert all(table.get(key) == b"x" for key in keys)


def test_keys_removed_while_the_table_grows_hide_no_others(kv):
    table, keys = kv.Table(), []
    while not (table.growing and table.capacity == 2048):  # all of them are still in the old slots, most in a row
        keys.append(b"%d" % len(keys))
        assert table.set(keys[-1], b"x")
    random.Random(1).shuffle(keys)
    while keys:
        assert table.remove(keys.pop())
        assert table.growing
        assert all(table.get(key) == b"x" for key in keys)
    assert len(table) == 0 and table.items() == []


def test_used_memory_is_counted_to_the_byte_and_all_of_it_comes_back(kv):
    table = kv.Table()
    assert table.used == table.capacity * SLOT
    for i in range(1000):
        assert table.set(b"%d" % i, b"v" * (i % 100))
    while table.growing:
        assert table.set(b"0", b"")
    assert table.used == table.capacity * SLOT + memory_of(table.items())
    assert table.set(b"1", b"v" * 1000)
    assert table.set(b"1", b"v")  # does not keep the room of the long one
    assert table.used == table.capacity * SLOT + memory_of(table.items())
    table.clear()
    assert (len(table), table.used, table.n_expiring) == (0, table.capacity * SLOT, 0)


def test_an_expired_key_is_not_there_and_its_successor_has_no_time(kv):
    table = kv.Table()
    assert table.set(b"a", b"1", expires=10)
    assert table.get(b"a", now=10) == b"1"
    assert table.items(now=11) == []
    assert table.get(b"a", now=11) is None
    assert (len(table), table.n_expiring) == (0, 0)
    assert table.set(b"a", b"2", now=11)
    assert table.get(b"a", now=10**15) == b"2"


def test_expired_keys_that_nobody_asks_for_go_as_others_come(kv):
    table = kv.Table()
    for i in range(1000):
        assert table.set(b"old%d" % i, b"x", expires=10)
    for i in range(2000):
        assert table.set(b"new%d" % (i % 10), b"x", now=11)
    assert len(table) == 10 and table.n_expiring == 0


@pytest.mark.parametrize("seed", range(3))
def test_used_memory_never_exceeds_maxmemory(kv, seed):
    chance = random.Random(seed)
    table, refused = kv.Table(maxmemory=200_000), 0
    for _ in range(5000):
        key = b"%d" % chance.randrange(2000)
        if chance.random() < 0.9:
            refused += not table.set(key, bytes(chance.choice([1, 50, 500])))
        else:
            table.remove(key)
        assert table.used <= 200_000
    assert refused


def test_memory_of_expired_keys_is_given_to_new_ones(kv):
    table = kv.Table(maxmemory=100_000)
    i = 0
    while table.set(b"%d" % i, bytes(100), expires=10):
        i += 1
    assert i > 100
    assert table.set(b"new", bytes(1000), now=11)


def test_memory_of_expired_keys_is_given_to_new_ones_while_the_table_grows(kv):
    table, i = kv.Table(maxmemory=2 << 20), 0
    while table.capacity < 16_384:
        assert table.set(b"%d" % i, bytes(100), expires=10)
        i += 1
    assert table.growing  # nearly all of them are in the old slots
    assert not table.prepare(1, 1 << 20, now=10)
    assert table.prepare(1, 1 << 20, now=10 + 60_000)
    assert table.set(b"new", bytes(1 << 20), now=10 + 60_000)
    assert table.get(b"new", now=10 + 60_000) == bytes(1 << 20)
    for key in range(i):
        assert table.get(b"%d" % key, now=10 + 60_000) is None
    assert len(table) == 1 and table.n_expiring == 0


def test_keys_that_are_over_while_others_are_not_are_found_when_memory_runs_out(kv):
    """However far apart they are; and no key goes that is not over."""
    table, i = kv.Table(maxmemory=12 << 20), 0
    while table.set(b"%d" % i, bytes(100), expires=10 if i % 7 == 0 else 10**9):
        i += 1
    assert i > 40_000
    assert table.prepare(1, 200_000, now=11 + 60_000)
    for key in range(i):
        assert (table.get(b"%d" % key, now=11) is not None) == (key % 7 != 0)


def test_a_write_for_which_there_is_no_memory_is_refused_quickly(kv):
    table, i = kv.Table(maxmemory=16 << 20), 0
    while table.set(b"%d" % i, b"", expires=10**9):
        i += 1
    assert i > 100_000
    begin = time.thread_time()
    for now in range(2, 1002):
        assert not table.prepare(1, 1 << 20, now=now)
    assert time.thread_time() - begin < patient(0.3)
    assert len(table) == i


def test_many_writes_at_once_for_which_there_is_no_memory_are_refused_quickly(kv):
    """A transaction is such: it has one time for all of them, and nobody else is served meanwhile."""
    table, i = kv.Table(maxmemory=16 << 20), 0
    while table.set(b"%d" % i, b"", expires=10**9):
        i += 1
    begin = time.thread_time()
    for _ in range(100_000):
        assert not table.prepare(1, 1 << 20, now=2)
    assert time.thread_time() - begin < patient(0.3)
    assert len(table) == i


def test_a_few_keys_that_end_soon_do_not_make_a_full_table_look_for_them_all_the_time(kv):
    """Each makes room for the next, once it was found among all the others, which never end."""
    table, n_keys, now, n_set = kv.Table(maxmemory=16 << 20), 0, 1, 0
    while table.set(b"%d" % n_keys, b""):
        n_keys += 1
    assert n_keys > 100_000
    table.remove(b"0")
    now += 60_000
    begin = time.thread_time()
    for i in range(1000):
        n_set += table.set(b"-%d" % i, b"", expires=now + 1, now=now)
        now += 5
    assert time.thread_time() - begin < patient(1.5)
    assert n_set > 10
    assert table.set(b"last", b"", now=now + 60_000)


# ------------------------------------------------------------------------------------ requests in pieces, limits


@settings(deadline=None, max_examples=scaled(300, minimum=20))
@given(
    st.lists(
        st.sampled_from([b"*", b"$", b"\r\n", b"\n", b"1", b"3", b"0", b"-", b" ", b'"', b"'", b"\\x41", b"\0"])
        | st.sampled_from(
            [
                b"SET",
                b"GET",
                b"*2\r\n$3\r\nGET\r\n$1\r\na\r\n",
                b"a",
                b"*1\r\n$4\r\nPING\r\n",
                b"MULTI\r\n",
                b"EXEC\r\n",
            ]
        )
        | st.binary(max_size=5),
        max_size=40,
    ).map(b"".join),
    st.lists(st.integers(1, 200), max_size=12),
)
def test_any_bytes_mean_the_same_however_they_are_split(stream, places):
    module = probe()
    results = []
    for pieces in (cut(stream, []), cut(stream, places), cut(stream, range(len(stream)))):
        server = module.Server()
        client = module.Client(server)
        outcome = fed(client, pieces)
        unread = client.unread if outcome == module.MORE else None
        results.append((outcome, client.take(), unread))
        del client
        assert server.waiting_memory == 0 and server.n_clients == 0
    assert results[0] == results[1] == results[2]


def test_a_long_request_in_small_pieces_is_parsed_once(kv):
    """Parsed from its beginning at each piece it would take minutes."""
    n = scaled(100_000, minimum=10_000)
    stream = array(b"MGET", *[b"k"] * n)
    client = kv.Client(kv.Server())
    begin = time.thread_time()
    assert fed(client, cut(stream, range(0, len(stream), 7))) == kv.MORE
    assert time.thread_time() - begin < patient(10)
    assert client.take() == b"*%d\r\n" % n + b"$-1\r\n" * n


def test_a_line_that_is_too_long_is_refused_wherever_it_is_cut(kv):
    for prefix, words in ((b"", b"too big inline request"), (b"*", b"too big mbulk count string")):
        for size in (65_537, 70_000):
            stream = prefix + b"1" * (size - len(prefix))
            for step in (1000, 65_537):
                client = kv.Client(kv.Server())
                assert fed(client, cut(stream, range(0, len(stream), step))) == kv.CLOSE
                assert client.take() == b"-ERR Protocol error: " + words + b"\r\n"
        client = kv.Client(kv.Server())
        assert client.feed(prefix + b"1" * (65_536 - len(prefix))) == kv.MORE


def test_an_array_of_too_many_arguments_is_refused_before_they_come(kv):
    client = kv.Client(kv.Server())
    assert client.feed(b"*1048577\r\n") == kv.CLOSE
    assert client.take() == b"-ERR Protocol error: invalid multibulk length\r\n"
    client = kv.Client(server := kv.Server())
    assert client.feed(b"*1048576\r\n") == kv.MORE
    assert server.waiting_memory < 10_000  # room is made for arguments as they come


def test_an_argument_that_is_announced_takes_no_memory_before_it_comes(kv):
    client = kv.Client(server := kv.Server(argument=1 << 20))
    assert client.feed(b"*1\r\n$1048576\r\n") == kv.MORE
    assert server.waiting_memory < 10_000
    client = kv.Client(server)
    assert client.feed(b"*1\r\n$1048577\r\n") == kv.CLOSE


def test_a_client_with_too_much_unread_is_closed_and_its_memory_comes_back(kv):
    server = kv.Server(argument=100_000, request=100_000)
    client = kv.Client(server)
    assert client.feed(b"*3\r\n$3\r\nSET\r\n") == kv.MORE
    assert client.feed(b"$90000\r\n" + b"x" * 89_000) == kv.MORE
    assert server.waiting_memory <= 2 * 131_072
    assert client.feed(b"x" * 1000 + b"\r\n$90000\r\n" + b"x" * 50_000) == kv.CLOSE
    del client
    assert server.waiting_memory == 0


def test_all_clients_together_may_have_only_so_much_unread(kv):
    server = kv.Server(argument=100_000, request=200_000, waiting=500_000)
    clients, outcomes = [], []
    for _ in range(10):
        clients.append(kv.Client(server))
        outcomes.append(clients[-1].feed(b"*2\r\n$3\r\nGET\r\n$100000\r\n" + b"x" * 99_000))
    assert outcomes[:3] == [kv.MORE] * 3 and kv.CLOSE in outcomes
    assert clients[0].feed(b"x" * 1000 + b"\r\n") == kv.MORE  # who was there first is not disturbed
    assert clients[0].take() == b"$-1\r\n"


def test_who_holds_little_is_not_closed_for_what_others_hold(kv):
    server = kv.Server(argument=100_000, request=200_000, waiting=500_000)
    clients = [kv.Client(server) for _ in range(5)]
    for client, size in zip(clients, (99_000, 99_000, 99_000, 50_000, 50_000), strict=True):
        assert client.feed(b"*2\r\n$3\r\nGET\r\n$100000\r\n" + b"x" * size) == kv.MORE
    assert server.waiting_memory > 500_000
    client = kv.Client(server)
    assert client.feed(b"*1\r\n$4\r\nPI") == kv.MORE
    assert client.feed(b"NG\r\n") == kv.MORE
    assert client.take() == b"+PONG\r\n"
    assert clients[-1].feed(b"x" * 20_000) == kv.CLOSE  # that would no longer be little


def test_a_client_that_is_closed_holds_nothing_although_it_has_not_gone_yet(kv):
    server = kv.Server(argument=100_000, request=200_000, output=100_000, output_pause=1000)
    client = kv.Client(server)
    assert client.feed(b"MULTI\n" + array(b"SET", b"a", b"x" * 90_000)) == kv.MORE
    assert server.waiting_memory > 90_000
    assert client.feed(b"*1\r\n$x\r\n") == kv.CLOSE
    assert server.waiting_memory == 0
    client = kv.Client(server)
    assert client.feed(b"*2\r\n$4\r\nECHO\r\n$90000\r\n" + b"x" * 89_000) == kv.MORE
    assert server.waiting_memory > 89_000
    client.refuses = True
    assert client.feed(b"x" * 1000 + b"\r\n") == kv.CLOSE
    assert server.waiting_memory == 0
    assert client.feed(b"x" * 1000) == client.again() == kv.CLOSE
    client = kv.Client(server)
    assert client.feed(array(b"ECHO", b"x" * 2000)) == client.feed(array(b"ECHO", b"x" * 90_000)) == kv.PAUSED
    client.end()
    assert server.waiting_memory == 0


def test_requests_of_who_does_not_read_wait(kv):
    server = kv.Server(output_pause=10_000)
    client = kv.Client(server)
    assert client.feed(array(b"SET", b"a", b"v" * 1000)) == kv.MORE
    assert client.take() == b"+OK\r\n"
    reply = b"$1000\r\n" + b"v" * 1000 + b"\r\n"
    outcome, received, most = client.feed(array(b"GET", b"a") * 1000), b"", 0
    assert client.feed(array(b"INCR", b"n")) == outcome == kv.PAUSED
    for _ in range(1000):
        most = max(most, len(client.replies))
        received += client.take()
        outcome = client.again()
        if outcome != kv.PAUSED:
            break
    received += client.take()
    assert outcome == kv.MORE
    assert replies(received) == [reply] * 1000 + [b":1\r\n"]
    assert most < 10_000 + 65_536 + len(reply)  # one buffer of replies more
    assert client.unread == 0 and server.waiting_memory == 0


def test_who_does_not_read_and_goes_on_sending_is_closed(kv):
    client = kv.Client(kv.Server(output_pause=1, request=50_000, argument=1000))
    outcome, n = client.feed(array(b"PING")), 0
    assert outcome == kv.PAUSED
    while outcome == kv.PAUSED and n < 10_000:
        outcome = client.feed(array(b"PING") * 100)
        n += 1
    assert outcome == kv.CLOSE and n < 100
    assert client.take() == b"+PONG\r\n"


def test_one_request_with_a_reply_without_measure_ends_the_connection(kv):
    client = kv.Client(kv.Server(output=1_000_000))
    assert client.feed(array(b"SET", b"a", b"v" * 100_000)) == kv.MORE
    assert client.feed(array(b"MGET", *[b"a"] * 10_000)) == kv.CLOSE
    assert len(client.take()) < 1_000_000 + 200_000


def test_a_client_that_takes_nothing_more_is_closed_and_what_it_asked_is_done(kv):
    client = kv.Client(server := kv.Server())
    client.refuses = True
    large = array(b"ECHO", b"x" * 100_000)  # does not wait for the end of the chunk
    assert client.feed(array(b"SET", b"a", b"0") + large + array(b"SET", b"a", b"1")) == kv.CLOSE
    assert client.feed(array(b"SET", b"a", b"2")) == kv.CLOSE  # nothing is run any more
    other = kv.Client(server)
    assert other.feed(array(b"GET", b"a")) == kv.MORE
    assert other.take() == b"$1\r\n1\r\n"


def test_requests_that_waited_are_run_when_the_client_has_gone(kv):
    client = kv.Client(server := kv.Server(output_pause=1))
    assert client.feed(array(b"PING")) == kv.PAUSED
    assert client.feed(array(b"SET", b"a", b"1")) == kv.PAUSED
    other = kv.Client(server)
    other.feed(array(b"GET", b"a"))
    assert other.take() == b"$-1\r\n"
    client.end()
    assert other.again() == kv.MORE
    other.feed(array(b"GET", b"a"))
    assert other.take() == b"$1\r\n1\r\n"


def test_much_work_is_done_a_little_at_a_time_and_others_are_served_in_between(kv):
    server = kv.Server()
    client, other = kv.Client(server), kv.Client(server)
    assert fed(client, [array(b"MSET", *(b"%d" % i for i in range(40_000)))]) == kv.MORE
    assert client.take() == b"+OK\r\n"
    outcome, n, turns, longest = client.feed(b"KEYS x\n" * 1000 + b"INCR n\n"), 0, 0, 0
    while outcome == kv.PAUSED:
        assert other.feed(b"EXISTS n\n") == kv.MORE
        assert other.take() == b":0\r\n"
        n += len(replies(client.take()))
        begin = time.thread_time()
        outcome = client.again()
        longest = max(longest, time.thread_time() - begin)
        turns += 1
    assert outcome == kv.MORE and client.unread == 0
    assert n + len(replies(client.take())) == 1001
    assert turns > 2 and longest < patient(0.1)


def test_a_client_that_has_gone_leaves_no_work_for_hours(kv):
    for requests in (b"KEYS x\n" * 150_000, b"INCR n\n" * 2_000_000, b"MULTI\n" + b"KEYS x\n" * 150_000 + b"EXEC\n"):
        server = kv.Server(output_pause=1, request=1 << 24)
        client = kv.Client(server)
        assert client.feed(array(b"MSET", *(b"%d" % i for i in range(20_000)))) == kv.PAUSED
        assert client.feed(requests) == kv.PAUSED
        begin = time.thread_time()
        client.end()
        assert time.thread_time() - begin < patient(0.1)
        other = kv.Client(server)
        other.feed(b"INCR n\n")
        assert 1 <= int(other.take()[1:]) < 2_000_000


def test_a_backlog_may_be_cut_anywhere_between_two_turns(kv):
    """Whole requests, and those that come in pieces, longer and shorter than what is run before the clock is seen."""
    chance = random.Random(3)
    requests = [array(b"ECHO", b"x" * chance.choice([1, 100, 60_000, 66_000, 200_000])) for _ in range(60)]
    requests += [b"ECHO " + b"y" * 60_000 + b"\r\n", array(b"MGET", *[b"k"] * 30_000), array(b"ECHO", b"z" * 900_000)]
    chance.shuffle(requests)
    stream = b"".join(requests)
    expected = kv.Client(kv.Server(request=1 << 25))
    assert fed(expected, [stream]) == kv.MORE
    expected = expected.take()
    for _ in range(scaled(20, minimum=3)):
        client = kv.Client(kv.Server(output_pause=1, request=1 << 25))
        assert client.feed(b"PING\n") == kv.PAUSED
        for piece in cut(stream, [chance.randrange(len(stream)) for _ in range(chance.randrange(5))]):
            client.feed(piece)
            for _ in range(chance.randrange(3)):
                client.again()
        while client.again() == kv.PAUSED:
            pass
        assert client.take() == b"+PONG\r\n" + expected
        assert client.unread == 0


def test_a_transaction_takes_few_commands_that_take_long(kv):
    client = kv.Client(kv.Server())
    assert fed(client, [b"MULTI\n" + b"KEYS x\n" * 16 + b"SET a 1\n" * 100 + b"EXEC\n"]) == kv.MORE
    assert client.take() == b"+OK\r\n" + b"+QUEUED\r\n" * 116 + b"*116\r\n" + b"*0\r\n" * 16 + b"+OK\r\n" * 100
    assert fed(client, [b"MULTI\n" + b"KEYS x\n" * 17 + b"EXEC\n" + b"MULTI\nKEYS x\nEXEC\n"]) == kv.MORE
    last = replies(client.take())[17:]
    assert last[0].startswith(b"-ERR too many commands")
    assert last[1].startswith(b"-EXECABORT") and last[2:] == [b"+OK\r\n", b"+QUEUED\r\n", b"*1\r\n*0\r\n"]


def test_what_multi_queues_is_limited_too(kv):
    client = kv.Client(server := kv.Server(request=100_000, argument=10_000))
    assert client.feed(array(b"MULTI")) == kv.MORE
    outcomes = [client.feed(array(b"SET", b"a", b"v" * 10_000)) for _ in range(11)]
    assert outcomes[0] == kv.MORE and outcomes[-1] == kv.CLOSE
    del client
    assert server.waiting_memory == 0


def test_a_transaction_that_memory_does_not_suffice_for_ends_the_connection(kv):
    """Its reply has begun with the number of replies that it consists of."""
    client = kv.Client(server := kv.Server())
    assert client.feed(b"MULTI\nSET a 1\nMGET" + b" a" * 20 + b"\nSET a 2\n") == kv.MORE
    assert client.take() == b"+OK\r\n" + b"+QUEUED\r\n" * 3
    kv.fail_realloc(1)
    assert client.feed(b"EXEC\nPING\n") == kv.CLOSE
    assert client.take() == b"*3\r\n+OK\r\n"
    assert server.waiting_memory == 0


def test_mset_that_does_not_fit_sets_nothing(kv):
    client = kv.Client(kv.Server(maxmemory=20_000))
    words = [b"MSET"]
    for i in range(100):
        words += [b"k%d" % i, b"v" * 200]
    assert client.feed(array(*words)) == kv.MORE
    assert client.take().startswith(b"-OOM ")
    assert client.feed(array(b"DBSIZE")) == kv.MORE
    assert client.take() == b":0\r\n"


def test_names_of_clients_are_short(kv):
    client = kv.Client(kv.Server())
    client.feed(
        array(b"CLIENT", b"SETNAME", b"n" * 64) + array(b"CLIENT", b"SETNAME", b"n" * 65) + array(b"CLIENT", b"GETNAME")
    )
    first, second, third = replies(client.take())
    assert first == b"+OK\r\n" and second.startswith(b"-ERR ") and third == b"$64\r\n" + b"n" * 64 + b"\r\n"


# ------------------------------------------------------------------------------------------------- long replies

TURN = 65_536  # bytes that a client is sent in one turn


def taken_in_turns(client, outcome):
    """What it is sent until nothing is left, each turn's for itself; and the last outcome."""
    turns = [client.take()]
    while outcome == probe().PAUSED:
        outcome = client.again()
        turns.append(client.take())
    return turns, outcome


def bulk(value):
    return b"$%d\r\n%s\r\n" % (len(value), value)


def pattern(i, size):
    """A value of which each part tells whose it is."""
    return (b"<%d>" % i * (size // 3 + 1))[:size]


def test_a_long_reply_is_sent_a_turn_at_a_time_and_values_are_not_copied(kv):
    value = random.Random(1).randbytes(1_000_000)
    client = kv.Client(server := kv.Server())
    assert client.feed(array(b"SET", b"a", value)) == kv.MORE
    used = server.used
    for request, reply in (
        (array(b"GET", b"a"), bulk(value)),
        (array(b"MGET", *[b"a"] * 20), b"*20\r\n" + bulk(value) * 20),
        (
            b"MULTI\nGET a\nINCR n\nGET a\nEXEC\n",
            b"+OK\r\n" + b"+QUEUED\r\n" * 3 + b"*3\r\n%s:1\r\n%s" % ((bulk(value),) * 2),
        ),
    ):
        client.take()
        outcome = client.feed(request)
        assert outcome == kv.PAUSED and server.waiting_memory < 10_000
        turns, outcome = taken_in_turns(client, outcome)
        assert outcome == kv.MORE and b"".join(turns) == reply
        assert max(map(len, turns)) == TURN and len(turns) == -(-len(reply) // TURN)
        assert server.waiting_memory < 1000  # room for the arguments of a next request
    assert fed(client, [b"DEL n\n"]) == kv.MORE and server.used == used


@pytest.mark.parametrize("size", [4096, 4097, 30_000, 65_525, 65_526, 65_536, 65_537, 131_072])
@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_values_of_any_length_come_in_order_between_other_replies(kv, size, n):
    client = kv.Client(kv.Server(request=1 << 25))
    for i in range(n):
        assert client.feed(array(b"SET", b"%d" % i, pattern(i, size))) == kv.MORE
    client.take()
    values = [bulk(pattern(i, size)) for i in range(n)]
    requests = [array(b"GET", b"%d" % i) + b"INCR n\n" for i in range(n)]
    requests += [array(b"MGET", *(b"%d" % i for i in range(n))), b"PING\n", array(b"ECHO", pattern(7, size)), b"QUIT\n"]
    turns, outcome = taken_in_turns(client, client.feed(b"".join(requests)))
    expected = b"".join(b"%s:%d\r\n" % (value, i) for i, value in enumerate(values, 1))
    expected += b"*%d\r\n" % n + b"".join(values) + b"+PONG\r\n" + bulk(pattern(7, size)) + b"+OK\r\n"
    assert b"".join(turns) == expected and outcome == kv.CLOSE
    assert max(map(len, turns)) <= TURN


LARGE = pattern(1, 500_000)
WHAT_HAPPENS_TO_IT = {
    "removed": (array(b"DEL", b"a"), None),
    "flushed": (array(b"FLUSHALL"), None),
    "over": (array(b"PEXPIRE", b"a", b"-1"), None),
    "overwritten": (array(b"SET", b"a", pattern(2, 500_000)), pattern(2, 500_000)),
    "overwritten by a short one": (array(b"SET", b"a", b"12"), b"12"),
    "overwritten, removed": (array(b"MSET", b"a", pattern(2, 499_000), b"a", b"1") + array(b"DEL", b"a"), None),
    "given a time": (array(b"EXPIRE", b"a", b"1000"), LARGE),
}


@pytest.mark.parametrize("name", WHAT_HAPPENS_TO_IT)
def test_a_value_that_is_being_sent_stays_as_it_is_whatever_happens_to_its_key(kv, name):
    requests, after = WHAT_HAPPENS_TO_IT[name]
    server = kv.Server()
    clients, other = [kv.Client(server) for _ in range(3)], kv.Client(server)
    empty = server.used
    assert fed(other, [array(b"SET", b"a", LARGE)]) == kv.MORE
    full = server.used
    outcomes = [client.feed(array(b"GET", b"a") + b"PING\n") for client in clients]
    assert outcomes == [kv.PAUSED] * 3
    assert fed(other, [requests]) == kv.MORE
    assert server.used >= full  # it is still there
    assert fed(other, [b"FLUSHALL\n" if after is None else b"PING\n"]) == kv.MORE
    other.take()
    clients.pop().end()
    for client in clients:
        turns, outcome = taken_in_turns(client, kv.PAUSED)
        assert b"".join(turns) == bulk(LARGE) + b"+PONG\r\n" and outcome == kv.MORE
    assert server.used <= full
    turns, _ = taken_in_turns(other, other.feed(array(b"GET", b"a")))
    assert b"".join(turns) == (b"$-1\r\n" if after is None else bulk(after))
    assert fed(other, [b"FLUSHALL\n"]) == kv.MORE and server.used == empty


def test_set_with_get_sends_the_value_that_it_replaces(kv):
    client = kv.Client(kv.Server())
    assert client.feed(array(b"SET", b"a", LARGE)) == kv.MORE
    client.take()
    turns, _ = taken_in_turns(client, client.feed(array(b"SET", b"a", pattern(2, 500_000), b"GET")))
    assert b"".join(turns) == bulk(LARGE)
    turns, _ = taken_in_turns(client, client.feed(array(b"GET", b"a")))
    assert b"".join(turns) == bulk(pattern(2, 500_000))


def test_values_that_are_being_sent_count_as_used_memory(kv):
    server = kv.Server(maxmemory=1_200_000)
    client, other = kv.Client(server), kv.Client(server)
    request = array(b"SET", b"a", LARGE)
    assert other.feed(request) == kv.MORE
    assert client.feed(array(b"GET", b"a")) == kv.PAUSED
    assert other.feed(request + array(b"DEL", b"a") + request * 2) == kv.MORE
    assert server.used <= 1_200_000
    assert [reply[:4] for reply in replies(other.take())] == [b"+OK\r", b"+OK\r", b":1\r\n", b"+OK\r", b"-OOM"]
    taken_in_turns(client, kv.PAUSED)
    assert other.feed(request) == kv.MORE
    assert other.take() == b"+OK\r\n"


@pytest.mark.parametrize("seed", range(3))
def test_many_clients_at_any_speed_get_whole_values_and_all_memory_comes_back(kv, seed):
    chance = random.Random(seed)
    server = kv.Server(request=1 << 25)
    empty, clients = server.used, [[kv.Client(server), 0, bytearray(), kv.MORE] for _ in range(8)]
    for i in range(scaled(3000, minimum=300)):
        state = chance.choice(clients)
        client, key = state[0], b"%d" % chance.randrange(4)
        action = chance.random()
        if state[3] == kv.PAUSED and action < 0.7:
            state[2] += client.take()
            state[3] = client.again()
        elif action < 0.98:
            value = pattern(i, chance.choice([10, 5000, 70_000, 200_000]))
            kinds = [(b"GET", key), (b"MGET", key, b"0", key), (b"SET", key, value), (b"SET", key, value, b"GET")]
            state[3] = client.feed(array(*chance.choice([*kinds, (b"DEL", key), (b"FLUSHALL",)])))
            state[1] += 1
        else:
            client.end()
            clients.remove(state)
            clients.append([kv.Client(server), 0, bytearray(), kv.MORE])
    for client, n, received, outcome in clients:
        turns, outcome = taken_in_turns(client, outcome)
        found = replies(bytes(received) + b"".join(turns))
        assert outcome == kv.MORE and len(found) == n
        for reply in found:
            for value in elements(reply) if reply.startswith(b"*") else [reply]:
                if value.startswith(b"$") and value != b"$-1\r\n":
                    value = value[value.index(b"\n") + 1 : -2]
                    assert value == (value[: value.index(b">") + 1] * len(value))[: len(value)]
    assert server.waiting_memory == 0
    fed(clients[0][0], [b"FLUSHALL\n"])
    assert server.used == empty


def test_what_a_client_sends_while_a_reply_waits_brings_it_no_more_of_it(kv):
    client = kv.Client(kv.Server())
    assert client.feed(array(b"SET", b"a", LARGE)) == kv.MORE
    client.take()
    assert client.feed(array(b"GET", b"a")) == kv.PAUSED
    assert [client.feed(b"PING\n") for _ in range(10)] == [kv.PAUSED] * 10
    assert len(client.replies) == TURN


def test_who_is_refused_for_what_others_have_waiting_gets_it_later(kv):
    client = kv.Client(server := kv.Server())
    client.busy = True
    assert client.feed(b"SET a 1\nGET a\n") == kv.PAUSED
    assert client.feed(b"GET a\nQUIT\nSET a 2\n") == kv.PAUSED
    assert client.take() == b"" and 0 < server.waiting_memory < 5000
    client.busy = False
    turns, outcome = taken_in_turns(client, kv.PAUSED)
    assert b"".join(turns) == b"+OK\r\n$1\r\n1\r\n$1\r\n1\r\n+OK\r\n" and outcome == kv.CLOSE
    assert server.waiting_memory == 0


def test_who_quits_gets_what_waits_first_and_nothing_more_is_run(kv):
    for last in (b"QUIT\n", b"*1\r\n$x\r\n", b"POST\n"):
        client = kv.Client(server := kv.Server())
        client.busy = True
        assert client.feed(b"SET a 1\n" + last + b"SET a 2\n") == client.feed(b"SET a 3\n") == kv.PAUSED
        client.busy = False
        assert client.again() == kv.CLOSE
        assert client.take().startswith(b"+OK\r\n" + {b"Q": b"+OK\r\n", b"*": b"-ERR Proto", b"P": b""}[last[:1]])
        client.end()
        other = kv.Client(server)
        other.feed(b"GET a\n")
        assert other.take() == b"$1\r\n1\r\n"


def test_who_is_refused_although_nothing_waits_is_closed(kv):
    """Else it would be tried again without an end."""
    client = kv.Client(server := kv.Server())
    client.busy = True
    assert client.feed(b"PING\n") == kv.PAUSED
    assert client.again() == kv.CLOSE
    assert server.waiting_memory == 0


def test_replies_of_all_clients_that_had_to_be_copied_have_a_limit_together(kv):
    server = kv.Server(waiting=2_000_000)
    clients = [kv.Client(server) for _ in range(10)]
    for i in range(10):
        assert fed(clients[0], [array(b"SET", b"%d" % i + b"k" * 50_000, b"")]) == kv.MORE
    outcomes = [client.feed(b"KEYS *\n") for client in clients]
    assert outcomes[:3] == [kv.PAUSED] * 3 and outcomes[-3:] == [kv.CLOSE] * 3
    assert server.waiting_memory <= 2_000_000
    assert clients[-1].feed(b"PING\n") == kv.CLOSE
    del clients
    assert server.waiting_memory == 0


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_long_reply_that_memory_does_not_suffice_for_ends_the_connection(kv, n):
    client = kv.Client(server := kv.Server())
    assert client.feed(array(b"SET", b"a", LARGE)) == kv.MORE
    used = server.used
    kv.fail_malloc(n)
    assert client.feed(array(b"MGET", b"a", b"a")) == kv.CLOSE
    kv.fail_malloc(0)
    assert server.waiting_memory == 0 and server.used == used
