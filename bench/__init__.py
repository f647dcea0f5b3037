"""Benchmarks beside a peer in the same run: `./dev bench [NAME...]`, docs/performance.md."""
