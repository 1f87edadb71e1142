"""The pictogram model of retrodiff: ``Model.load("pictograms")`` finds it in this package."""
