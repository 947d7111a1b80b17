"""What all peers of a run must agree on: manifest, signed records, claim rules, blobs, streams, status, transport."""
