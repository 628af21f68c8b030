"""What tests, benchmarks and drills share: an object store, a fault proxy, a list server, hosts, drawn cars."""
