// The only program in the test cluster's own image: the pause container, and a server and a client to try the network with.
module spillway.dev/tests/podling

go 1.26.0
