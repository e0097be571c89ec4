"""What the lab's ablation is handed of MAIN, as its launcher hands it in."""

from launch.lab_ablation import controls_of_main

CONTROLS = controls_of_main()
