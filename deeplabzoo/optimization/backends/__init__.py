"""Other libraries' kernels under our label maps; each module has `build(net, precision, ...)`."""
