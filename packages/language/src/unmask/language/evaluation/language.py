ROWS = {"trained": "trained model", "random": "untrained model"}


def measure(job):
    raise NotImplementedError


def table(result):
    raise NotImplementedError
