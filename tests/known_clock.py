"""A device whose times are known: it has a queue, a host that fills it, and nothing of a GPU."""

from dataclasses import dataclass, field


@dataclass
class KnownClock:
    """Times in microseconds. A call tells it what it costs by `work`; the device works behind the host.

    Attributes
    ----------
    host, device
        The host's time, and when the device will have done what is queued.
    cache
        Size of its cache in bytes.
    slow_replays
        So many of a graph's first replays take ten times as long.
    """

    host: float = 0.0
    device: float = 0.0
    cache: int = 0
    slow_replays: int = 0
    recording: bool = False
    graphs: list[int] = field(default_factory=list)
    _in_graph: bool = False
    _factor: float = 1.0

    def work(self, host_us, device_us):
        """A call that takes the host so long to queue, and the device so long to do. Whether it is really done now."""
        if self.recording:
            return False
        if not self._in_graph:
            self.host += host_us
        self.device = max(self.device, self.host) + device_us * self._factor
        return True

    def now_s(self):
        return self.host * 1e-6

    def synchronize(self):
        self.host = max(self.host, self.device)

    def device_us(self, call):
        begin = self.device = max(self.device, self.host)
        call()
        self.synchronize()
        return self.device - begin

    def graph(self, calls):
        self.recording = True
        for call in calls:
            call()
        self.recording = False
        self.graphs.append(0)
        number = len(self.graphs) - 1

        def replay():
            self.graphs[number] += 1
            self._in_graph, self._factor = True, 10.0 if self.graphs[number] <= self.slow_replays else 1.0
            for call in calls:
                call()
            self._in_graph, self._factor = False, 1.0

        return replay

    def cache_bytes(self):
        return self.cache
