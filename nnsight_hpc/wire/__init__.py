"""What crosses a process border: messages, states, errors, HTTP client, lease record, atomic files. No torch."""
