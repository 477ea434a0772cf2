"""Online calibration: corrects predictions with the lengths of finished requests.

``corrections`` fits one correction, ``online`` keeps one for each served model and SLO class.
``state`` saves them to disk, so that they survive a restart.
"""
