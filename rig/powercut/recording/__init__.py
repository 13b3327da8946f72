"""From a scenario to a trace."""
