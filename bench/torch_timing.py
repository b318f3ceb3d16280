"""Device time of PyTorch work by the method of the device benches: a CUDA graph of R launches on R sets of buffers, a
read of 512 MiB before every replay, which leaves nothing of earlier ones in the L2 cache, and a short spin that hides the
launch of the graph. Median of 11 replays, divided by R."""
import json
import statistics

import torch

FLUSH_BYTES = 512 << 20
REPLAYS = 11
SPIN_CYCLES = 200_000


def say(**line):
    """One JSON object a line; numbers of interest are rounded by whoever reads them."""
    print(json.dumps(line), flush=True)


class Timer:
    def __init__(self):
        self.flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
        self.sum = torch.zeros((), dtype=torch.int64, device="cuda")
        self.read()
        torch.cuda.synchronize()

    def read(self):
        torch.sum(self.flush, dim=0, out=self.sum)

    def microseconds(self, launches):
        """`launches`: functions that each enqueue one launch on buffers of their own and return its outputs."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries choose kernels and take workspaces outside of the capture
                launches[0]()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [launch() for launch in launches]
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        times = []
        for replay in range(REPLAYS + 2):
            self.read()
            torch.cuda._sleep(SPIN_CYCLES)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if replay >= 2:
                times.append(1e3 * begin.elapsed_time(end) / len(launches))
        del outputs
        return statistics.median(times)


def about():
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(),
        "method": "CUDA graph on rotating buffers, 512 MiB read before each replay, median of 11",
    }
