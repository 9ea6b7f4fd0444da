"""The user's model, called without leaving a trace: state, function, guard, trace."""
