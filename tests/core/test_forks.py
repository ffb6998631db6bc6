"""What a forked child is told, and what it keeps."""

from pairs import run_fresh


def test_a_forked_child_drops_what_is_named_and_nothing_else():
    program = """
        import os, socket, warnings
        from edgeml.core import forks
        from edgeml.core.errors import Closed

        warnings.simplefilter("ignore", ResourceWarning)

        def serve():
            listening = socket.create_server(("127.0.0.1", 0))
            dialled = socket.create_connection(listening.getsockname())
            return listening, dialled, listening.accept()[0]

        served, asked, ours, other = serve(), serve(), serve(), os.pipe()

        class End:
            def abandon(self):
                told.append(os.getpid())
                forks.drop_sockets(port=served[0].getsockname()[1])
                forks.drop_sockets(peers=[asked[0].getsockname()])
                forks.drop_descriptors([other[0]])

        told, end = [], End()
        forks.watch_forks(end)

        def is_socket(sock):
            try:
                return bool(sock.getsockname())
            except OSError:
                return False

        if not os.fork():
            assert told == [os.getpid()]
            kept = [[is_socket(each) for each in three] for three in (served, asked, ours)]
            # The accepted one of those that were asked has their port, too, but it's not named.
            assert kept == [[False, True, False], [True, False, True], [True] * 3], kept
            os.fstat(other[0])
            assert os.read(other[0], 1) == b""  # of nothing
            os._exit(0)
        assert os.wait()[1] == 0
        assert not told
        for listening, dialled, accepted in (served, asked, ours):
            dialled.send(b"x")
            assert accepted.recv(1) == b"x"
        os.write(other[1], b"x")
        assert os.read(other[0], 1) == b"x"
        del end
        if not os.fork():
            os._exit(len(told))
        assert os.wait()[1] == 0
    """
    assert run_fresh(program)[0] == ""
