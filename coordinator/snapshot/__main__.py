from lutetia.coordinator.snapshot.process import main

if __name__ == "__main__":
    main()
