"""Networks as files for other runtimes: written, proven against the network, measured; `deeplabzoo.export` is the command."""
