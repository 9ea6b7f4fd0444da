"""
What a tail fit can and cannot tell
===================================

Synthetic spectra with a known answer: the template, a frozen kernel, and a pure power law. The
slope is found in each. What made the tail is another question.
"""

# %%
# The template
# ------------
# Spectra of ε = A λ^−b exp(−κ λ^(b−1)) at several times, with noisy batches.

import matplotlib.pyplot as plt
import pandas as pd

from spectralshell import GRSDTailFitter, TailFitDisplay
from spectralshell.datasets import make_grsd_spectra, make_lazy_spectra
from spectralshell.shells import ShellPartition, energy_frame

partition = ShellPartition.covering(1e-3, 0.99, q=1.5, lambda_0=1.0)


def fit(measures):
    """Fit the tail of spectra with known answers."""
    return GRSDTailFitter().fit(energy_frame(measures, partition))


rows = []
for b in (0.7, 1.3, 1.6, 2.0, 3.0):
    fitter = fit(make_grsd_spectra(b, random_state=0))
    lower, upper = fitter.b_interval_
    rows.append({"true b": b, "b": fitter.b_, "lower": lower, "upper": upper})
    rows[-1]["status"] = fitter.status_
pd.DataFrame(rows).round(2)

# %%
# A frozen kernel
# ---------------
# Here nothing moves between scales: an error with density λ^−s decays as exp(−2λτ). The template
# still fits. The comparison says which cutoff it was.

rows = []
for s in (0.5, 1.0, 1.5, 2.0, 3.0):
    fitter = fit(make_lazy_spectra(s, random_state=0))
    rows.append({"true s": s, "b of the template": fitter.b_, "status": fitter.status_})
pd.DataFrame(rows).round(2)

# %%
# At s = 2 the two are the same function, and no data can decide. Elsewhere the frozen kernel ranks
# first:

fit(make_lazy_spectra(1.5, random_state=0)).comparison_

# %%
# The falsifier frees the power p of the cutoff exp(−κ λ^p) and gives its interval. That of a frozen
# kernel is p = 1.

fit(make_lazy_spectra(1.5, random_state=1)).falsifier_

# %%

measures = make_grsd_spectra(1.6, random_state=0)
TailFitDisplay.from_estimator(fit(measures), energy_frame(measures, partition)).plot()
plt.show()
