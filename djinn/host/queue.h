// Products that begin when a device has marked that their inputs are there, and that end with a mark for the device.
//
// They are computed in the order in which they were put here, by a thread that takes part in them. Nobody has to wait
// for it but the device, which does not compute what comes after a product before it finds the mark.

#pragma once

#include <deque>

#include "threads.h"

// As in djinn/host/queue.py. Times are seconds of std::chrono::steady_clock.
struct Product {
    const struct Matrix* matrices;
    int64_t many;
    const uint16_t* vectors;  // [count, columns]
    int64_t count, columns;
    std::atomic<uint32_t>* arrived;  // the mark of the inputs: `number` or a later one, counting on from the last to 0
    std::atomic<uint32_t>* computed;
    uint32_t number;
    double asked, there, done;  // when a thread came to it, its inputs were there, and its outputs
};

class Queue {
  public:
    // `compute` multiplies. Throws std::system_error where the system starts no more threads.
    Queue(int cpu, std::function<void(const Product&)> compute)
        : compute(std::move(compute)), worker(&Queue::serve, this) {
        if (cpu >= 0) Threads::pin(worker, cpu);
    }

    // Ends without products whose inputs are not there, and marks them: a device that waits for one goes on.
    ~Queue() {
        closing = true;
        rouse();
        worker.join();
        for (Product* product : waiting) finish(*product);
    }

    // Adds a product, which stays where it is until it is computed.
    void put(Product* product) {
        {
            std::lock_guard<std::mutex> guard(lock);
            waiting.push_back(product);
            left++;
        }
        rouse();
    }

    // How many products are not computed yet.
    int64_t unfinished() const { return left; }

  private:
    std::function<void(const Product&)> compute;
    std::deque<Product*> waiting;
    std::mutex lock;
    std::condition_variable wake;
    std::atomic<int64_t> left{0};
    std::atomic<bool> closing{false};
    std::thread worker;  // the last one: it uses the others

    static double now() { return std::chrono::duration<double>(Threads::Clock::now().time_since_epoch()).count(); }

    void rouse() {
        { std::lock_guard<std::mutex> guard(lock); }  // so that it is not between its look and its sleep
        wake.notify_one();
    }

    void finish(const Product& product) {
        product.computed->store(product.number);
        left--;
    }

    Product* next() {
        auto since = Threads::Clock::now();
        for (int spins = 1; left == 0 && Threads::Clock::now() - since < Threads::PATIENCE; spins++) {
            if (closing) return nullptr;
            Threads::spin(spins);
        }
        std::unique_lock<std::mutex> guard(lock);
        wake.wait(guard, [&] { return closing || !waiting.empty(); });
        if (closing) return nullptr;
        Product* product = waiting.front();
        waiting.pop_front();
        return product;
    }

    void serve() {
        while (Product* product = next()) {
            product->asked = now();
            for (int spins = 1; int32_t(product->arrived->load() - product->number) < 0; spins++) {
                if (closing) return finish(*product);
                Threads::spin(spins);
            }
            product->there = now();
            compute(*product);
            product->done = now();
            finish(*product);
        }
    }
};
