"""What arrives: traces, arrival processes, lengths, sessions and mixes."""
