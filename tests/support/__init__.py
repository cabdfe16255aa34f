"""What tests share: servers and clients at hand, faults on order, samples, child processes."""
