"""From a trace to a verdict: who judges, where it is run, and what is told of what was found."""
