"""What a stranger's package would hold, as text for the tests to install."""

TRANSPORT = """
    from edgeml.core import Transport, hookimpl, load_transport

    class Mine(Transport):
        name = {name!r}

        def serve(self, url, on_request, *, credentials=None, limits=None):
            raise NotImplementedError

        def connect(self, url, timeout, *, credentials=None):
            raise NotImplementedError

    @hookimpl
    def edgeml_transport():
        return Mine
"""
